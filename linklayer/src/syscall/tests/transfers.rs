use super::*;

const S_IFREG: u32 = 0o100_644;
const S_IFIFO: u32 = 0o010_644;
const S_IFCHR: u32 = 0o020_644;
const S_IFSOCK: u32 = 0o140_644;
const BIG: u64 = 1 << 20;

fn stat_reply(v: &mut Vessel<'_>, mode: u32, rdev: u64) -> i64 {
    let stat = v.args[1];
    v.at(stat, 144).fill(0);
    v.at(stat + 24, 4).copy_from_slice(&mode.to_le_bytes());
    v.at(stat + 40, 8).copy_from_slice(&rdev.to_le_bytes());
    0
}

/// What a simulated file does with one part: given its offset and length, the result.
struct Home<'a> {
    mode: u32,
    rdev: u64,
    socket_type: u32,
    domain: u32,
    part: &'a mut dyn FnMut(&mut Vessel<'_>, u32) -> i64,
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    Done(i64),
    GoHome(HomeReason),
}

fn run(nr: u32, args: [u64; 6], memory: &LocalMemory, home: &mut Home<'_>) -> End {
    let mut transfer = match gather(nr, &args, memory) {
        Err(GatherError::TooBig(transfer)) => transfer,
        other => panic!("expected a transfer, got {other:?}"),
    };
    for _ in 0..100 {
        let request = match transfer.next(memory) {
            Step::Done(ret) => return End::Done(ret),
            Step::GoHome(reason) => return End::GoHome(reason),
            Step::Call(request) => request.clone(),
        };
        let reply = answer(&request, |v| match request.nr {
            5 => stat_reply(v, home.mode, home.rdev),
            55 => {
                assert_eq!((v.args[0], v.args[1]), (args[0], 1));
                let value = if v.args[2] == 3 {
                    home.socket_type
                } else {
                    home.domain
                };
                let (buf, len) = (v.args[3], v.args[4]);
                assert_eq!(v.u32_at(len), 4);
                v.at(buf, 4).copy_from_slice(&value.to_le_bytes());
                0
            }
            nr => (home.part)(v, nr),
        });
        transfer.reply(Reply::parse(&reply).unwrap(), memory).unwrap();
    }
    panic!("the transfer does not end");
}

fn home<'a>(mode: u32, part: &'a mut dyn FnMut(&mut Vessel<'_>, u32) -> i64) -> Home<'a> {
    Home {
        mode,
        rdev: 0,
        socket_type: 1,
        domain: 1,
        part,
    }
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i / 253) as u8 ^ i as u8).collect()
}

#[test]
fn a_file_is_written_in_parts() {
    let body = pattern(BIG);
    let memory = memory(&body);
    let mut file = Vec::new();
    let mut part = |v: &mut Vessel<'_>, nr: u32| {
        assert_eq!(nr, 1);
        let (buf, len) = (v.args[1], v.args[2] as usize);
        file.extend_from_slice(v.at(buf, len));
        len as i64
    };
    assert_eq!(
        run(
            1,
            [3, GUEST, BIG, 0, 0, 0],
            &memory,
            &mut home(S_IFREG, &mut part)
        ),
        End::Done(BIG as i64)
    );
    assert!(file == body);
}

#[test]
fn a_file_is_read_at_an_offset_until_it_ends() {
    let content = pattern(600_000);
    let memory = memory(&vec![0; BIG as usize]);
    let mut part = |v: &mut Vessel<'_>, nr: u32| {
        assert_eq!(nr, 17);
        let (buf, len, offset) = (v.args[1], v.args[2] as usize, v.args[3] as usize);
        let end = (offset + len).min(content.len());
        let here = &content[offset..end];
        v.at(buf, here.len()).copy_from_slice(here);
        here.len() as i64
    };
    let end = run(
        17,
        [3, GUEST, BIG, 1000, 0, 0],
        &memory,
        &mut home(S_IFREG, &mut part),
    );
    assert_eq!(end, End::Done(599_000));
    assert!(peek(&memory, GUEST, 599_000) == content[1000..]);
}

#[test]
fn vectors_are_cut_where_the_parts_end() {
    let body = pattern(BIG);
    let memory = memory(&body);
    let mut iov = Vec::new();
    for (base, len) in [
        (GUEST, 300_001),
        (GUEST + 300_001, 0),
        (GUEST + 300_001, BIG - 300_001),
    ] {
        iov.extend_from_slice(&u64::to_le_bytes(base));
        iov.extend_from_slice(&u64::to_le_bytes(len));
    }
    memory.map(GUEST + 2 * BIG, iov, false);
    let mut file = Vec::new();
    let mut part = |v: &mut Vessel<'_>, _| {
        let before = file.len();
        for i in 0..v.args[2] {
            let (base, len) = (
                v.u64_at(v.args[1] + 16 * i),
                v.u64_at(v.args[1] + 16 * i + 8) as usize,
            );
            file.extend_from_slice(v.at(base, len));
        }
        (file.len() - before) as i64
    };
    let end = run(
        20,
        [3, GUEST + 2 * BIG, 3, 0, 0, 0],
        &memory,
        &mut home(S_IFREG, &mut part),
    );
    assert_eq!(end, End::Done(BIG as i64));
    assert!(file == body);
}

#[test]
fn what_was_transferred_is_the_result_when_something_stops_the_rest() {
    let memory = memory(&pattern(BIG));
    for stop in [-4, -512, -28, 0, 17] {
        let mut calls = 0;
        let mut part = |v: &mut Vessel<'_>, _| {
            calls += 1;
            if calls == 3 { stop } else { v.args[2] as i64 }
        };
        let end = run(
            1,
            [3, GUEST, BIG, 0, 0, 0],
            &memory,
            &mut home(S_IFIFO, &mut part),
        );
        assert_eq!(end, End::Done(2 * BODY_MAX as i64 + stop.max(0)));
    }
    let mut part = |_: &mut Vessel<'_>, _| -512;
    assert_eq!(
        run(
            1,
            [3, GUEST, BIG, 0, 0, 0],
            &memory,
            &mut home(S_IFIFO, &mut part)
        ),
        End::Done(-512)
    );
}

#[test]
fn short_counts_where_the_kernel_gives_them() {
    let memory = memory(&pattern(BIG));
    let full = BODY_MAX as i64;
    let mut part = |v: &mut Vessel<'_>, _| v.args[2] as i64;
    let args = [3, GUEST, BIG, 0, 0, 0];
    assert_eq!(
        run(0, args, &memory, &mut home(S_IFIFO, &mut part)),
        End::Done(full)
    );
    assert_eq!(
        run(0, args, &memory, &mut home(S_IFSOCK, &mut part)),
        End::Done(full)
    );
    assert_eq!(run(0, args, &memory, &mut home(0, &mut part)), End::Done(full));
    assert_eq!(
        run(0, args, &memory, &mut home(S_IFCHR, &mut part)),
        End::Done(full)
    );
    // /dev/zero gives all that is asked for.
    let mut zero = Home {
        rdev: 0x105,
        ..home(S_IFCHR, &mut part)
    };
    assert_eq!(run(0, args, &memory, &mut zero), End::Done(BIG as i64));
    // MSG_WAITALL
    let mut part = |v: &mut Vessel<'_>, nr: u32| {
        assert_eq!((nr, v.args[4], v.args[5]), (45, 0, 0));
        v.args[2] as i64
    };
    let args = [3, GUEST, BIG, 0x100, 0, 0];
    assert_eq!(
        run(45, args, &memory, &mut home(S_IFSOCK, &mut part)),
        End::Done(BIG as i64)
    );
}

#[test]
fn datagrams_are_not_split() {
    let memory = memory(&pattern(BIG));
    let args = [3, GUEST, BIG, 0, 0, 0];
    let mut none = |_: &mut Vessel<'_>, _| panic!("nothing is transferred");
    let mut datagram = Home {
        socket_type: 2,
        ..home(S_IFSOCK, &mut none)
    };
    assert_eq!(
        run(44, args, &memory, &mut datagram),
        End::GoHome(HomeReason::TooBig)
    );
    assert_eq!(
        run(45, args, &memory, &mut datagram),
        End::GoHome(HomeReason::TooBig)
    );
    let mut part = |_: &mut Vessel<'_>, _| 1400;
    let mut internet = Home {
        socket_type: 2,
        domain: 2,
        ..home(S_IFSOCK, &mut part)
    };
    assert_eq!(run(45, args, &memory, &mut internet), End::Done(1400));
}

#[test]
fn control_data_goes_with_the_first_part() {
    let memory = memory(&pattern(BIG));
    let at = GUEST + 2 * BIG;
    let words = [
        0,
        0,
        at + 64,
        1,
        at + 96,
        16,
        0,
        0,
        GUEST,
        BIG,
        0,
        0,
        16,
        0x1_0000_0001,
    ];
    memory.map(
        at,
        words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect(),
        true,
    );
    let mut first = true;
    let mut part = |v: &mut Vessel<'_>, _| {
        let msg = v.args[1];
        assert_eq!(v.u64_at(msg + 40), if first { 16 } else { 0 });
        assert_eq!(v.u64_at(msg + 32) == 0, !first);
        first = false;
        let iov = v.u64_at(msg + 16);
        v.u64_at(iov + 8) as i64
    };
    let end = run(46, [3, at, 0, 0, 0, 0], &memory, &mut home(S_IFSOCK, &mut part));
    assert_eq!(end, End::Done(BIG as i64));
}

#[test]
fn bad_descriptors_and_buffers_that_end() {
    let memory = memory(&pattern(BIG / 2));
    let Err(GatherError::TooBig(mut transfer)) = gather(1, &[9, GUEST, BIG, 0, 0, 0], &memory) else {
        panic!("expected a transfer")
    };
    let Step::Call(request) = transfer.next(&memory) else {
        panic!("expected a call")
    };
    let reply = answer(&request.clone(), |_| -9);
    transfer.reply(Reply::parse(&reply).unwrap(), &memory).unwrap();
    assert!(matches!(transfer.next(&memory), Step::Done(-9)));
    let mut part = |v: &mut Vessel<'_>, _| v.args[2] as i64;
    let end = run(
        1,
        [3, GUEST, BIG, 0, 0, 0],
        &memory,
        &mut home(S_IFREG, &mut part),
    );
    assert_eq!(end, End::Done(2 * BODY_MAX as i64));
}

/// Writes a large body to a file of this mode; the call with this number (the first one asks what it is) is interrupted before home has begun it.
fn interrupted(mode: u32, which: usize) -> i64 {
    let memory = memory(&pattern(BIG));
    let Err(GatherError::TooBig(mut transfer)) = gather(1, &[9, GUEST, BIG, 0, 0, 0], &memory) else {
        panic!("expected a transfer")
    };
    for number in 0..100 {
        let request = match transfer.next(&memory) {
            Step::Done(ret) => return ret,
            Step::Call(request) => request.clone(),
            Step::GoHome(reason) => panic!("{reason:?}"),
        };
        if number == which {
            transfer.not_made(-513);
            continue;
        }
        let reply = answer(&request, |v| match request.nr {
            5 => stat_reply(v, mode, 0),
            _ => v.args[2] as i64,
        });
        transfer.reply(Reply::parse(&reply).unwrap(), &memory).unwrap();
    }
    panic!("the transfer does not end");
}

#[test]
fn a_file_that_has_taken_a_part_takes_the_rest() {
    for which in [0, 1] {
        assert_eq!(interrupted(S_IFREG, which), -513);
        assert_eq!(interrupted(S_IFIFO, which), -513);
    }
    for parts in [1, 2] {
        assert_eq!(interrupted(S_IFREG, parts + 1), BIG as i64);
        assert_eq!(interrupted(S_IFIFO, parts + 1), (parts * BODY_MAX) as i64);
    }
}
