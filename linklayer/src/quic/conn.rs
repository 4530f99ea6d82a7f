//! One QUIC connection of a link, and its streams.
//!
//! The first stream, opened by the end that connects, carries [`Control`]. Every other stream belongs to a channel of the session and
//! begins, in each direction that is used, with the channel's number and the number of the first frame. Nothing but
//! control is read before the connection is *established*: before both ends have said hello, so that what arrives is
//! counted against the right session.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    Connection, ConnectionError, ConnectionHandle, Dir, Endpoint, Event, ReadError, ReadableError,
    StreamEvent, StreamId, WriteError,
};
use rustc_hash::FxHashMap;

use super::control::{Control, PREAMBLE_LEN, preamble, read_preamble};
use crate::frame::{Assembler, Frame, Header};
use crate::session::{CHANNELS, CONTROL_CHANNEL, Receipt, Session};

/// Which of a link's sockets a connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// The one that is connected to the peer.
    Main,
    /// The one on which connections come to be.
    Side,
}

/// A frame that is to be delivered.
pub(super) type Delivery = (u32, Header, Vec<u8>);

/// What a connection has to say to the link.
#[derive(Debug)]
pub(super) enum News {
    /// The handshake is done: both ends have proved who they are.
    Connected,
    /// It is gone.
    Gone(ConnectionError),
    /// A message of the other end's link.
    Control(Control),
    /// The peer does what no peer does.
    Broken(String),
}

/// See the module's documentation.
pub(super) struct Conn {
    pub(super) handle: ConnectionHandle,
    pub(super) quic: Connection,
    pub(super) via: Via,
    /// When it is given up if it is not established by then.
    pub(super) expires: Instant,
    pub(super) established: bool,
    /// The endpoint has forgotten it, and may give its handle to another.
    pub(super) drained: bool,
    pub(super) frames_sent: u64,
    pub(super) frames_received: u64,
    control_in: Incoming,
    control_out: Outgoing,
    outgoing: FxHashMap<u32, Outgoing>,
    incoming: FxHashMap<StreamId, Incoming>,
    /// Channels that wait for the peer to allow another stream.
    unopened: VecDeque<u32>,
}

/// The sending half of a channel.
#[derive(Debug)]
struct Outgoing {
    stream: Option<StreamId>,
    /// What the stream has not taken yet of the frames that the session handed out.
    rest: VecDeque<Bytes>,
    blocked: bool,
}

/// The receiving half of a stream.
#[derive(Debug, Default)]
struct Incoming {
    begin: [u8; PREAMBLE_LEN],
    have: usize,
    /// The channel and the number of the next frame, once the preamble is here.
    position: Option<(u32, u64)>,
    assembler: Assembler,
}

impl Conn {
    pub(super) fn new(handle: ConnectionHandle, quic: Connection, via: Via, expires: Instant) -> Self {
        Self {
            handle,
            quic,
            via,
            expires,
            established: false,
            drained: false,
            frames_sent: 0,
            frames_received: 0,
            control_in: Incoming::default(),
            control_out: Outgoing::begin(None, CONTROL_CHANNEL, 0),
            outgoing: FxHashMap::default(),
            incoming: FxHashMap::default(),
            unopened: VecDeque::new(),
        }
    }

    /// The stream that carries control, in both directions.
    fn control_stream() -> StreamId {
        StreamId::new(quinn_proto::Side::Client, Dir::Bi, 0)
    }

    /// Sends a message to the other end's link.
    pub(super) fn send_control(&mut self, message: &Control) {
        if self.control_out.stream.is_none() {
            let stream = if self.quic.side().is_client() {
                self.quic.streams().open(Dir::Bi)
            } else {
                Some(Self::control_stream())
            };
            let Some(stream) = stream else { return };
            self.control_out.stream = Some(stream);
            // A link without control is soon a link without acknowledgements: it goes first.
            let _ = self.quic.send_stream(stream).set_priority(1);
        }
        self.control_out.rest.push_back(message.encode().into());
        let _ = self.control_out.write(&mut self.quic);
    }

    /// Both ends have said hello: from now on frames are read and written.
    pub(super) fn establish(
        &mut self,
        now: Instant,
        session: &mut Session,
        inbox: &mut VecDeque<Delivery>,
    ) -> Vec<News> {
        self.established = true;
        let mut news = Vec::new();
        let waiting: Vec<StreamId> = self.incoming.keys().copied().collect();
        for stream in waiting {
            self.read(now, stream, session, inbox, &mut news);
        }
        self.write_ready(session);
        news
    }

    /// Takes in what the QUIC connection has to say since the last time.
    pub(super) fn advance(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        session: &mut Session,
        inbox: &mut VecDeque<Delivery>,
        news: &mut Vec<News>,
    ) {
        while let Some(event) = self.quic.poll_endpoint_events() {
            self.drained |= event.is_drained();
            if let Some(answer) = endpoint.handle_event(self.handle, event) {
                self.quic.handle_event(answer);
            }
        }
        while let Some(event) = self.quic.poll() {
            match event {
                Event::Connected => news.push(News::Connected),
                Event::ConnectionLost { reason } => news.push(News::Gone(reason)),
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) => {
                    while let Some(stream) = self.quic.streams().accept(Dir::Bi) {
                        if stream != Self::control_stream() {
                            self.incoming.insert(stream, Incoming::default());
                        }
                        self.read(now, stream, session, inbox, news);
                    }
                }
                Event::Stream(StreamEvent::Readable { id }) => self.read(now, id, session, inbox, news),
                Event::Stream(StreamEvent::Writable { id }) => self.unblock(id, session),
                Event::Stream(StreamEvent::Available { dir: Dir::Bi }) => {
                    for channel in std::mem::take(&mut self.unopened) {
                        self.write_channel(channel, session);
                    }
                }
                Event::Stream(StreamEvent::Stopped { id, .. } | StreamEvent::Finished { id }) => {
                    news.push(News::Broken(format!("it ended stream {id}")));
                }
                _ => {}
            }
        }
    }

    /// Writes what the session has for this connection, as far as the connection takes it.
    pub(super) fn write_ready(&mut self, session: &mut Session) {
        while let Some(channel) = session.poll_channel() {
            self.write_channel(channel, session);
        }
    }

    fn write_channel(&mut self, channel: u32, session: &mut Session) {
        if !self.outgoing.contains_key(&channel) {
            let Some(stream) = self.quic.streams().open(Dir::Bi) else {
                self.unopened.push_back(channel);
                return;
            };
            // The peer may answer on it.
            self.incoming.insert(stream, Incoming::default());
            self.outgoing.insert(
                channel,
                Outgoing::begin(Some(stream), channel, session.next_index(channel)),
            );
        }
        let Some(out) = self.outgoing.get_mut(&channel) else {
            return;
        };
        while out.write(&mut self.quic) {
            let Some(frame) = session.poll_frame(channel) else {
                return;
            };
            self.frames_sent += 1;
            out.rest.push_back(frame);
        }
    }

    fn unblock(&mut self, stream: StreamId, session: &mut Session) {
        if self.control_out.stream == Some(stream) {
            self.control_out.blocked = false;
            let _ = self.control_out.write(&mut self.quic);
            return;
        }
        let found = self
            .outgoing
            .iter_mut()
            .find(|(_, out)| out.stream == Some(stream));
        if let Some((&channel, out)) = found {
            out.blocked = false;
            self.write_channel(channel, session);
        }
    }

    /// Reads all that is there of a stream.
    fn read(
        &mut self,
        now: Instant,
        stream: StreamId,
        session: &mut Session,
        inbox: &mut VecDeque<Delivery>,
        news: &mut Vec<News>,
    ) {
        let is_control = stream == Self::control_stream();
        if !is_control && !self.established {
            return;
        }
        let incoming = if is_control {
            Some(&mut self.control_in)
        } else {
            self.incoming.get_mut(&stream)
        };
        let Some(incoming) = incoming else { return };
        let mut begun = None;
        let outcome = (|| {
            let mut reader = self.quic.recv_stream(stream);
            let mut chunks = match reader.read(true) {
                Ok(chunks) => chunks,
                // Our own stream, on which the peer has said nothing yet.
                Err(ReadableError::ClosedStream) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            };
            loop {
                let chunk = match chunks.next(usize::MAX) {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => return Err("it ended a stream".to_owned()),
                    Err(ReadError::Blocked) => return Ok(()),
                    Err(error) => return Err(error.to_string()),
                };
                let mut rest = &chunk.bytes[..];
                while !rest.is_empty() {
                    if incoming.position.is_none() {
                        let Some((channel, first)) = incoming.begin(&mut rest) else {
                            continue;
                        };
                        if is_control != (channel == CONTROL_CHANNEL) {
                            return Err(format!("it sent channel {channel} on stream {stream}"));
                        }
                        if !is_control && channel >= CHANNELS {
                            return Err(format!("it sent channel {channel}, which does not exist"));
                        }
                        if !is_control && first > session.expected(channel) {
                            return Err(format!("it left out frames of channel {channel}"));
                        }
                        begun = Some(channel);
                        continue;
                    }
                    let Some(frame) = incoming
                        .assembler
                        .push(&mut rest)
                        .map_err(|error| error.to_string())?
                    else {
                        continue;
                    };
                    if is_control {
                        let message = Control::decode(&frame).ok_or("it sent a malformed control message")?;
                        news.push(News::Control(message));
                        continue;
                    }
                    self.frames_received += 1;
                    let Some((channel, index)) = incoming.position.as_mut() else {
                        continue;
                    };
                    let (channel, number) = (*channel, *index);
                    *index += 1;
                    let Frame {
                        header,
                        lane,
                        word,
                        payload,
                    } = frame;
                    match session.receive(now, channel, number, lane, word, payload.len()) {
                        Ok(Receipt::New) => inbox.push_back((lane, header, payload)),
                        Ok(Receipt::Duplicate) => {}
                        Err(error) => return Err(error.to_string()),
                    }
                }
            }
        })();
        if let Err(what) = outcome {
            news.push(News::Broken(what));
        }
        if let Some(channel) = begun
            && !is_control
            && !self.outgoing.contains_key(&channel)
        {
            // The peer opened the channel's stream: what goes back uses it.
            self.outgoing.insert(
                channel,
                Outgoing::begin(Some(stream), channel, session.next_index(channel)),
            );
            if let Some(at) = self.unopened.iter().position(|&unopened| unopened == channel) {
                self.unopened.remove(at);
                self.write_channel(channel, session);
            }
        }
    }
}

impl Outgoing {
    fn begin(stream: Option<StreamId>, channel: u32, first: u64) -> Self {
        let begin = Bytes::copy_from_slice(&preamble(channel, first));
        Self {
            stream,
            rest: VecDeque::from([begin]),
            blocked: false,
        }
    }

    /// Gives the stream what it takes; true when nothing is left.
    fn write(&mut self, quic: &mut Connection) -> bool {
        let Some(stream) = self.stream else { return false };
        if self.blocked {
            return false;
        }
        while let Some(front) = self.rest.front_mut() {
            match quic.send_stream(stream).write_chunks(std::slice::from_mut(front)) {
                Ok(written) if written.chunks == 1 => drop(self.rest.pop_front()),
                // Only a write that is refused altogether makes the stream report when it can take more.
                Ok(_) => {}
                Err(WriteError::Blocked) => {
                    self.blocked = true;
                    return false;
                }
                // The connection's end is reported by the connection.
                Err(_) => return false,
            }
        }
        true
    }
}

impl Incoming {
    /// Takes the preamble off the front of `input`; returns it when it is whole.
    fn begin(&mut self, input: &mut &[u8]) -> Option<(u32, u64)> {
        let take = input.len().min(PREAMBLE_LEN - self.have);
        self.begin[self.have..self.have + take].copy_from_slice(&input[..take]);
        self.have += take;
        *input = &input[take..];
        if self.have < PREAMBLE_LEN {
            return None;
        }
        let position = read_preamble(&self.begin);
        self.position = Some(position);
        Some(position)
    }
}
