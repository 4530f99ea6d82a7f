//! How QUIC is set up for a link.

use std::sync::Arc;
use std::time::Duration;

use quinn_proto::congestion::CubicConfig;
use quinn_proto::{MtuDiscoveryConfig, TransportConfig, VarInt};

use super::Options;
use crate::session::CHANNELS;

/// The first guess of the round trip: what a lost datagram of a handshake costs is three times this.
const FIRST_RTT: Duration = Duration::from_millis(50);
/// What is sent before the first acknowledgement; the default stalls the first large frame.
const INITIAL_WINDOW_BYTES: u64 = 1 << 20;

/// Long-lived streams in both directions, nothing else; no idle timeout, because silence is the link's business.
pub(super) fn transport(options: &Options) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(options.mtu_bytes);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(CHANNELS + 1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(None)
        .keep_alive_interval(Some(options.keep_alive))
        .stream_receive_window(VarInt::from_u32(options.stream_window_bytes))
        .receive_window(VarInt::from_u32(options.window_bytes))
        .send_window(options.send_window_bytes)
        .initial_rtt(FIRST_RTT)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(congestion));
    Arc::new(config)
}
