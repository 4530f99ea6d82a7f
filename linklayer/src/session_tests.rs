//! Two sessions, a network that cuts, and virtual time.

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::frame::Assembler;

/// What one end has put on the way to the other on the present connection.
#[derive(Default)]
struct Way {
    /// Per channel: number of the first frame on this connection, then the frames.
    channels: HashMap<u32, (u64, VecDeque<Bytes>)>,
    acks: VecDeque<Vec<(u32, u64)>>,
}

struct End {
    session: Session,
    sent: HashMap<u32, Vec<Vec<u8>>>,
    delivered: HashMap<u32, Vec<Vec<u8>>>,
}

/// Both ends and what lies between them.
struct Pair {
    now: Instant,
    ends: [End; 2],
    ways: [Way; 2],
}

impl Pair {
    fn new() -> Self {
        let end = || End {
            session: Session::new(),
            sent: HashMap::new(),
            delivered: HashMap::new(),
        };
        let mut pair = Self {
            now: Instant::now(),
            ends: [end(), end()],
            ways: [Way::default(), Way::default()],
        };
        pair.reconnect();
        pair
    }

    fn push(&mut self, from: usize, lane: u32, body: Vec<u8>) {
        let end = &mut self.ends[from];
        end.session.push(lane, Header::new(1, 2, 3), &[&body]).unwrap();
        end.sent.entry(lane).or_default().push(body);
        self.write(from);
    }

    fn write(&mut self, from: usize) {
        let (session, way) = (&mut self.ends[from].session, &mut self.ways[from]);
        while let Some(channel) = session.poll_channel() {
            let first = session.next_index(channel);
            let (_, frames) = way.channels.entry(channel).or_insert((first, VecDeque::new()));
            while let Some(frame) = session.poll_frame(channel) {
                frames.push_back(frame);
            }
        }
    }

    /// Delivers one frame of `channel`, if one is under way.
    fn deliver(&mut self, from: usize, channel: u32) -> bool {
        let Some((index, frames)) = self.ways[from].channels.get_mut(&channel) else {
            return false;
        };
        let Some(bytes) = frames.pop_front() else {
            return false;
        };
        let number = *index;
        *index += 1;
        let frame = Assembler::default().push(&mut &bytes[..]).unwrap().unwrap();
        let to = &mut self.ends[1 - from];
        let receipt = to
            .session
            .receive(
                self.now,
                channel,
                number,
                frame.lane,
                frame.word,
                frame.payload.len(),
            )
            .unwrap();
        if receipt == Receipt::New {
            to.delivered.entry(frame.lane).or_default().push(frame.payload);
        }
        true
    }

    fn time(&mut self, passed: Duration) {
        self.now += passed;
        for (end, way) in self.ends.iter_mut().zip(&mut self.ways) {
            if end.session.next_timeout().is_some_and(|at| at <= self.now) {
                let acks = end.session.take_acks();
                if !acks.is_empty() {
                    way.acks.push_back(acks);
                }
            }
        }
    }

    fn deliver_acks(&mut self, from: usize) {
        while let Some(acks) = self.ways[from].acks.pop_front() {
            for (channel, upto) in acks {
                self.ends[1 - from].session.acknowledged(channel, upto).unwrap();
            }
        }
    }

    fn cut(&mut self) {
        self.ways = [Way::default(), Way::default()];
        self.ends.iter_mut().for_each(|end| end.session.disconnected());
    }

    fn reconnect(&mut self) {
        self.cut();
        let positions = [self.ends[0].session.positions(), self.ends[1].session.positions()];
        self.ends[0].session.resume(&positions[1]).unwrap();
        self.ends[1].session.resume(&positions[0]).unwrap();
        self.write(0);
        self.write(1);
    }

    fn settle(&mut self) {
        for _ in 0..3 {
            for from in [0, 1] {
                let channels: Vec<u32> = self.ways[from].channels.keys().copied().collect();
                for channel in channels {
                    while self.deliver(from, channel) {}
                }
                self.deliver_acks(from);
            }
            self.time(ACK_DELAY);
        }
    }

    fn check(&self) {
        for from in [0, 1] {
            assert_eq!(self.ends[from].sent, self.ends[1 - from].delivered);
            assert_eq!(
                self.ends[from].session.kept_bytes(),
                0,
                "everything is acknowledged in the end"
            );
        }
    }
}

#[test]
fn frames_are_delivered_and_acknowledged() {
    let mut pair = Pair::new();
    pair.push(0, 5, b"one".to_vec());
    pair.push(0, 5, b"two".to_vec());
    assert_eq!(pair.ends[0].session.kept_bytes(), 2 * (HEADER_LEN + 3));
    pair.settle();
    pair.check();
}

#[test]
fn a_reply_carries_the_acknowledgement() {
    let mut pair = Pair::new();
    pair.push(0, 5, b"ask".to_vec());
    assert!(pair.deliver(0, 5));
    pair.push(1, 5, b"answer".to_vec());
    assert!(pair.deliver(1, 5));
    assert_eq!(pair.ends[0].session.kept_bytes(), 0);
    // Only the answer itself is left to be acknowledged.
    pair.time(ACK_DELAY);
    assert!(pair.ways[1].acks.is_empty());
    assert_eq!(pair.ways[0].acks, [vec![(5, 1)]]);
}

#[test]
fn what_was_under_way_is_sent_again_and_only_once_delivered() {
    let mut pair = Pair::new();
    for n in 0..5u8 {
        pair.push(0, 1, vec![n]);
    }
    pair.deliver(0, 1);
    pair.deliver(0, 1);
    pair.cut();
    pair.push(0, 1, vec![5]);
    pair.reconnect();
    pair.settle();
    pair.check();
    assert_eq!(pair.ends[0].session.resent(), 3);
    assert_eq!(pair.ends[1].session.duplicates(), 0);
}

#[test]
fn a_frame_that_slips_in_before_the_old_connection_ends_is_dropped_when_it_comes_again() {
    let mut pair = Pair::new();
    pair.push(0, 1, vec![1]);
    let early = pair.ends[1].session.positions();
    pair.deliver(0, 1);
    let positions = pair.ends[0].session.positions();
    pair.ways = [Way::default(), Way::default()];
    pair.ends[0].session.resume(&early).unwrap();
    pair.ends[1].session.resume(&positions).unwrap();
    pair.write(0);
    pair.settle();
    pair.check();
    assert_eq!(pair.ends[1].session.duplicates(), 1);
}

#[test]
fn impossible_claims_are_refused() {
    let mut pair = Pair::new();
    pair.push(0, 1, vec![1]);
    let now = pair.now;
    let session = &mut pair.ends[0].session;
    assert!(session.acknowledged(1, 2).is_err());
    assert!(session.acknowledged(9, 1).is_err());
    assert!(session.acknowledged(9, 0).is_err());
    assert!(session.resume(&[(1, 2)]).is_err());
    assert!(session.resume(&[(7, 1)]).is_err());
    assert_eq!(
        session.receive(now, 1, 3, 1, 0, 1),
        Err(SessionError::Gap {
            channel: 1,
            index: 3,
            expected: 0
        })
    );
    assert!(session.receive(now, CONTROL_CHANNEL, 0, 1, 0, 1).is_err());
    session.acknowledged(1, 1).unwrap();
    assert!(
        session.resume(&[]).is_err(),
        "it cannot lose what it acknowledged"
    );
}

#[test]
fn there_is_no_end_of_lanes() {
    let mut pair = Pair::new();
    for lane in [0, 1, CHANNELS, CHANNELS + 1, 77_777, u32::MAX] {
        pair.push(0, lane, lane.to_le_bytes().to_vec());
        pair.push(1, lane, lane.to_le_bytes().to_vec());
    }
    pair.settle();
    pair.check();
    let now = pair.now;
    let wrong = pair.ends[0].session.receive(now, 1, 0, 2, 0, 1);
    assert_eq!(wrong, Err(SessionError::BadChannel { channel: 1 }));
}

#[test]
fn payloads_are_limited() {
    let mut session = Session::new();
    let body = vec![0; MAX_PAYLOAD];
    session.push(0, Header::default(), &[&body]).unwrap();
    let error = session.push(0, Header::default(), &[&body, &[1]]).unwrap_err();
    assert!(matches!(error, SessionError::TooLong { .. }));
}

#[derive(Debug, Clone)]
enum Step {
    Push(usize, u32, usize),
    Deliver(usize, u32),
    Acks(usize),
    Time(u64),
    Cut,
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..2, 0u32..3, 0usize..2000).prop_map(|(from, lane, len)| Step::Push(from, lane, len)),
        4 => (0usize..2, 0u32..3).prop_map(|(from, lane)| Step::Deliver(from, lane)),
        2 => (0usize..2).prop_map(Step::Acks),
        2 => (0u64..80).prop_map(Step::Time),
        1 => Just(Step::Cut),
        1 => Just(Step::Reconnect),
    ]
}

proptest! {
    #[test]
    fn every_frame_arrives_exactly_once_in_order(steps in prop::collection::vec(step(), 1..120)) {
        let mut pair = Pair::new();
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Push(from, lane, len) => pair.push(from, lane * CHANNELS / 2, vec![n as u8; len]),
                Step::Deliver(from, lane) => drop(pair.deliver(from, channel_of(lane * CHANNELS / 2))),
                Step::Acks(from) => pair.deliver_acks(from),
                Step::Time(ms) => pair.time(Duration::from_millis(ms)),
                Step::Cut => pair.cut(),
                Step::Reconnect => pair.reconnect(),
            }
        }
        pair.reconnect();
        pair.settle();
        pair.check();
    }
}
