use super::*;

/// A guest memory with builders of message headers in it.
struct Builder {
    memory: LocalMemory,
}

const IOV: u64 = GUEST + 0x1000;
const NAME: u64 = GUEST + 0x2000;
const CONTROL: u64 = GUEST + 0x3000;
const BODY: u64 = GUEST + 0x4000;

impl Builder {
    fn new() -> Builder {
        Builder {
            memory: memory(&[0x77; 0x80000]),
        }
    }

    fn words(&self, addr: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            self.memory
                .write(addr + 8 * i as u64, &word.to_le_bytes())
                .unwrap();
        }
    }

    fn header(&self, at: u64, namelen: u64, iov: &[(u64, u64)], controllen: u64) {
        let name = if namelen == 0 { 0 } else { NAME };
        let control = if controllen == 0 { 0 } else { CONTROL };
        self.words(
            at,
            &[name, namelen, IOV, iov.len() as u64, control, controllen, 0],
        );
        for (i, (base, len)) in iov.iter().enumerate() {
            self.words(IOV + 16 * i as u64, &[*base, *len]);
        }
    }
}

fn bodies(v: &mut Vessel<'_>, iov: u64, count: u64) -> Vec<(u64, usize)> {
    (0..count)
        .map(|i| (v.u64_at(iov + 16 * i), v.u64_at(iov + 16 * i + 8) as usize))
        .collect()
}

#[test]
fn vectors_are_scattered_in_order() {
    let b = Builder::new();
    b.words(IOV, &[BODY, 3, BODY + 100, 0, BODY + 200, 5]);
    let ret = call(19, [3, IOV, 3, 0, 0, 0], &b.memory, |v| {
        let iov = v.args[1];
        let list = bodies(v, iov, 3);
        assert_eq!(list.iter().map(|b| b.1).collect::<Vec<_>>(), [3, 0, 5]);
        v.at(list[0].0, 3).copy_from_slice(b"abc");
        v.at(list[2].0, 5)[..2].copy_from_slice(b"de");
        5
    });
    assert_eq!(ret, 5);
    assert_eq!(peek(&b.memory, BODY, 4), b"abcw");
    assert_eq!(peek(&b.memory, BODY + 200, 3), b"dew");
    let ret = call(20, [3, IOV, 3, 0, 0, 0], &b.memory, |v| {
        let iov = v.args[1];
        let list = bodies(v, iov, 3);
        assert_eq!(v.at(list[0].0, 3), b"abc");
        assert_eq!(v.at(list[2].0, 5), b"dewww");
        8
    });
    assert_eq!(ret, 8);
}

#[test]
fn a_message_is_sent_with_name_and_control_data() {
    let b = Builder::new();
    b.header(GUEST, 16, &[(BODY, 4), (BODY + 8, 4)], 24);
    b.memory.write(NAME, b"sixteen bytes...").unwrap();
    b.memory.write(CONTROL, &[5; 24]).unwrap();
    let ret = call(46, [3, GUEST, 0x4000, 0, 0, 0], &b.memory, |v| {
        let msg = v.args[1];
        let (name, iov, control) = (v.u64_at(msg), v.u64_at(msg + 16), v.u64_at(msg + 32));
        assert_eq!(v.at(name, 16), b"sixteen bytes...");
        assert_eq!(
            (v.u32_at(msg + 8), v.u64_at(msg + 24), v.u64_at(msg + 40)),
            (16, 2, 24)
        );
        assert_eq!(v.at(control, 24), [5; 24]);
        let list = bodies(v, iov, 2);
        assert_eq!(v.at(list[1].0, 4), [0x77; 4]);
        8
    });
    assert_eq!(ret, 8);
}

#[test]
fn a_message_is_received_with_name_and_control_data() {
    let b = Builder::new();
    b.header(GUEST, 128, &[(BODY, 4), (BODY + 8, 4)], 64);
    let ret = call(47, [3, GUEST, 0, 0, 0, 0], &b.memory, |v| {
        let msg = v.args[1];
        let (name, iov, control) = (v.u64_at(msg), v.u64_at(msg + 16), v.u64_at(msg + 32));
        v.at(name, 128)[..16].fill(1);
        v.at(msg + 8, 4).copy_from_slice(&16u32.to_le_bytes());
        v.at(control, 64)[..20].fill(2);
        v.at(msg + 40, 8).copy_from_slice(&20u64.to_le_bytes());
        v.at(msg + 48, 4).copy_from_slice(&0x20u32.to_le_bytes());
        for (base, len) in bodies(v, iov, 2) {
            v.at(base, len).fill(3);
        }
        // MSG_TRUNC: the message was longer than the room.
        100
    });
    assert_eq!(ret, 100);
    assert_eq!(peek(&b.memory, NAME, 17)[15..], [1, 0x77]);
    assert_eq!(peek(&b.memory, CONTROL, 21)[19..], [2, 0x77]);
    assert_eq!(
        peek(&b.memory, BODY, 13),
        [3, 3, 3, 3, 0x77, 0x77, 0x77, 0x77, 3, 3, 3, 3, 0x77]
    );
    assert_eq!(peek(&b.memory, GUEST, 8), NAME.to_le_bytes());
    assert_eq!(peek(&b.memory, GUEST + 8, 4), 16u32.to_le_bytes());
    assert_eq!(
        peek(&b.memory, GUEST + 32, 24),
        [CONTROL.to_le_bytes(), 20u64.to_le_bytes(), 0x20u64.to_le_bytes()].concat()
    );
}

#[test]
fn control_data_that_finds_no_place_is_not_asked_for() {
    let b = Builder::new();
    b.header(GUEST, 0, &[(BODY, 4)], 64);
    b.words(GUEST + 32, &[0x7000_0000_0000]);
    call(47, [3, GUEST, 0, 0, 0, 0], &b.memory, |v| {
        let msg = v.args[1];
        assert_eq!(v.u64_at(msg + 32), HOLE);
        4
    });
}

#[test]
fn many_messages_at_once() {
    let b = Builder::new();
    b.words(IOV, &[BODY, 16, BODY + 64, 16]);
    for i in 0..2u64 {
        b.words(GUEST + 64 * i, &[0, 0, IOV + 16 * i, 1, 0, 0, 0, 0]);
    }
    let ret = call(299, [3, GUEST, 2, 0, 0, 0], &b.memory, |v| {
        let vector = v.args[1];
        let iov = v.u64_at(vector + 16);
        let base = v.u64_at(iov);
        v.at(base, 16)[..5].fill(1);
        v.at(vector + 56, 4).copy_from_slice(&5u32.to_le_bytes());
        1
    });
    assert_eq!(ret, 1);
    assert_eq!(peek(&b.memory, BODY, 6)[4..], [1, 0x77]);
    assert_eq!(peek(&b.memory, GUEST + 56, 4), 5u32.to_le_bytes());
    assert_eq!(
        peek(&b.memory, GUEST + 64 + 56, 4),
        [0; 4],
        "the second was not received"
    );
    assert_eq!(peek(&b.memory, BODY + 64, 16), [0x77; 16]);
    let ret = call(307, [3, GUEST, 2, 0, 0, 0], &b.memory, |v| {
        let vector = v.args[1];
        for i in 0..2 {
            let iov = v.u64_at(vector + 64 * i + 16);
            assert_eq!(v.u64_at(iov + 8), 16);
            let base = v.u64_at(iov);
            v.at(base, 16);
            v.at(vector + 64 * i + 56, 4)
                .copy_from_slice(&16u32.to_le_bytes());
        }
        2
    });
    assert_eq!(ret, 2);
    assert_eq!(peek(&b.memory, GUEST + 64 + 56, 4), 16u32.to_le_bytes());
}

#[test]
fn fewer_messages_are_asked_for_when_not_all_fit() {
    let b = Builder::new();
    b.words(IOV, &[BODY, 65536]);
    for i in 0..8u64 {
        b.words(GUEST + 64 * i, &[0, 0, IOV, 1, 0, 0, 0, 0]);
    }
    // MSG_WAITFORONE
    let ret = call(299, [3, GUEST, 8, 0x10000, 0, 0], &b.memory, |v| v.args[2] as i64);
    assert_eq!(ret, 3);
    assert_eq!(
        home_reason(gather(299, &[3, GUEST, 8, 0, 0, 0], &b.memory)),
        HomeReason::TooBig
    );
    let ret = call(307, [3, GUEST, 8, 0, 0, 0], &b.memory, |v| v.args[2] as i64);
    assert_eq!(ret, 3);
}
