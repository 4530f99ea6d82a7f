//! A peer with the right key that does what no peer does.

use quinn::{ClientConfig, Connection, Endpoint};

use super::*;
use crate::frame::HEADER_LEN;
use crate::quic::control::{Control, Hello, VERSION, preamble};
use crate::quic::keys::SERVER_NAME;
use crate::session::{CHANNELS, CONTROL_CHANNEL};

/// Runs `attack` as the peer of a listening link.
fn attack<F: Future<Output = ()>>(
    attack: impl FnOnce(Connection) -> F,
    patience: Duration,
) -> (Option<Link>, Receiver<Seen>) {
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let (peer, seen) = Peer::new();
    let accepted = thread::spawn(move || {
        listener
            .accept(fingerprint, peer, patience, Options::default())
            .ok()
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::client(local()).unwrap();
        let config = ClientConfig::new(key_a.client_config(key_b.fingerprint()).unwrap());
        let connection = endpoint
            .connect_with(config, address, SERVER_NAME)
            .unwrap()
            .await
            .unwrap();
        attack(connection.clone()).await;
        let _ = tokio::time::timeout(Duration::from_secs(3), connection.closed()).await;
    });
    (accepted.join().unwrap(), seen)
}

fn hello() -> Hello {
    Hello {
        version: VERSION,
        session: [5; 16],
        epoch: 1,
        positions: Vec::new(),
    }
}

fn opening(hello: Hello) -> Vec<u8> {
    [&preamble(CONTROL_CHANNEL, 0)[..], &Control::Hello(hello).encode()].concat()
}

/// Sends `bytes` as the first stream of a connection, which stays unestablished: the listener goes on waiting.
fn refused_before_it_stands(bytes: Vec<u8>) {
    let (link, seen) = attack(
        |connection| async move {
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            send.write_all(&bytes).await.unwrap();
            let why = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
            assert!(why.is_ok(), "it was not turned away");
        },
        Duration::from_millis(500),
    );
    assert!(link.is_none());
    assert!(seen.try_recv().is_err());
}

/// Says hello properly, then sends `bytes` as a stream of a lane, which must end the link.
fn ends_the_link(bytes: Vec<u8>) {
    let (link, seen) = attack(
        |connection| async move {
            let (mut control, _control_in) = connection.open_bi().await.unwrap();
            control.write_all(&opening(hello())).await.unwrap();
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            // The link may close while it is being written to.
            let _ = send.write_all(&bytes).await;
            let why = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
            assert!(why.is_ok(), "it was not turned away");
        },
        PATIENCE,
    );
    let lost = loop {
        match seen.recv_timeout(PATIENCE).unwrap() {
            Seen::Lost(error) => break error,
            Seen::Frame(..) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(lost, LinkError::Protocol(_)), "{lost:?}");
    // It may have ended before it was handed out.
    if let Some(link) = link {
        assert!(matches!(
            link.send(0, Header::default(), &[]),
            Err(LinkError::Protocol(_))
        ));
    }
}

#[test]
fn garbage_for_a_hello() {
    refused_before_it_stands(vec![0xaa; 300]);
    refused_before_it_stands([&preamble(CONTROL_CHANNEL, 0)[..], &[0x55; 100]].concat());
}

#[test]
fn a_lane_for_a_control_stream() {
    refused_before_it_stands(preamble(3, 0).to_vec());
}

#[test]
fn another_version() {
    refused_before_it_stands(opening(Hello {
        version: VERSION + 1,
        ..hello()
    }));
}

#[test]
fn a_claim_to_have_what_was_never_sent() {
    refused_before_it_stands(opening(Hello {
        positions: vec![(1, 1)],
        ..hello()
    }));
}

#[test]
fn two_hellos() {
    let (link, seen) = attack(
        |connection| async move {
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            send.write_all(&opening(hello())).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let again = Control::Hello(Hello { epoch: 2, ..hello() });
            send.write_all(&again.encode()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        },
        PATIENCE,
    );
    assert!(link.is_some());
    assert!(matches!(
        seen.recv_timeout(PATIENCE).unwrap(),
        Seen::Lost(LinkError::Protocol(_))
    ));
}

#[test]
fn an_oversized_frame() {
    let header = Header {
        len: MAX_PAYLOAD as u32 + 1,
        ..Header::default()
    };
    ends_the_link([&preamble(1, 0)[..], &header.encode(1, 0)].concat());
}

#[test]
fn frames_left_out() {
    ends_the_link(preamble(1, 7).to_vec());
}

#[test]
fn channels_that_do_not_exist() {
    ends_the_link(preamble(CONTROL_CHANNEL, 0).to_vec());
    ends_the_link(preamble(CHANNELS, 0).to_vec());
}

#[test]
fn a_lane_on_the_wrong_channel() {
    ends_the_link([&preamble(1, 0)[..], &Header::default().encode(2, 0)].concat());
}

#[test]
fn random_frames_are_carried_or_end_the_link_but_never_panic() {
    for _ in 0..10 {
        let mut noise = preamble(1, 0).to_vec();
        noise.extend((0..3000).map(|_| rand::random::<u8>()));
        // Not to depend on chance: the last thing is certainly wrong.
        noise[12 + HEADER_LEN - 8..12 + HEADER_LEN - 4].copy_from_slice(&u32::MAX.to_le_bytes());
        ends_the_link(noise);
    }
}

#[test]
fn a_stream_that_is_reset() {
    let (_link, seen) = attack(
        |connection| async move {
            let (mut control, _control_in) = connection.open_bi().await.unwrap();
            control.write_all(&opening(hello())).await.unwrap();
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            send.write_all(&preamble(1, 0)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            send.reset(9u32.into()).unwrap();
        },
        PATIENCE,
    );
    assert!(matches!(
        seen.recv_timeout(PATIENCE).unwrap(),
        Seen::Lost(LinkError::Protocol(_))
    ));
}

#[test]
fn as_many_channels_as_there_are() {
    let (_link, seen) = attack(
        |connection| async move {
            let (mut control, _control_in) = connection.open_bi().await.unwrap();
            control.write_all(&opening(hello())).await.unwrap();
            let mut all = Vec::new();
            for channel in 0..CHANNELS {
                let Ok((mut send, receive)) = connection.open_bi().await else {
                    return;
                };
                let frame = Header::new(NOTE, 0, 0).encode(channel + 7 * CHANNELS, 0);
                let bytes = [&preamble(channel, 0)[..], &frame].concat();
                if send.write_all(&bytes).await.is_err() {
                    return;
                }
                all.push((send, receive));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            connection.close(0u32.into(), b"");
        },
        PATIENCE,
    );
    let mut frames = 0u32;
    loop {
        match seen.recv_timeout(PATIENCE).unwrap() {
            Seen::Frame(..) => frames += 1,
            Seen::Lost(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(frames, CHANNELS);
}
