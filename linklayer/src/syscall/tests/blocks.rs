use super::*;

#[test]
fn read_gives_as_many_bytes_as_the_result_says() {
    let memory = memory(&[7; 64]);
    let ret = call(0, [5, GUEST + 8, 32, 99, 99, 99], &memory, |v| {
        assert_eq!(
            (v.args[0], v.args[2], v.args[3]),
            (5, 32, 0),
            "unused registers are not passed on"
        );
        let buf = v.args[1];
        v.at(buf, 32)[..3].copy_from_slice(b"abc");
        3
    });
    assert_eq!(ret, 3);
    assert_eq!(peek(&memory, GUEST + 7, 6), [7, b'a', b'b', b'c', 7, 7]);
}

#[test]
fn an_error_or_a_restart_code_changes_nothing() {
    for code in [-4, -11, -512, -516] {
        let memory = memory(&[7; 64]);
        assert_eq!(call(0, [0, GUEST, 32, 0, 0, 0], &memory, |_| code), code);
        assert_eq!(peek(&memory, GUEST, 64), [7; 64]);
    }
}

#[test]
fn write_carries_its_body_and_no_more() {
    let memory = memory(b"hello world");
    let ret = call(1, [1, GUEST + 6, 5, 0, 0, 0], &memory, |v| {
        assert_eq!(v.space, 5);
        assert_eq!(v.at(v.args[1], 5), b"world");
        5
    });
    assert_eq!(ret, 5);
    // Nothing to follow: the kernel sees an address and no length.
    assert_eq!(
        call(1, [1, GUEST + 6, 0, 0, 0, 0], &memory, |v| v.args[2] as i64),
        0
    );
    assert_eq!(call(1, [1, 0, 0, 0, 0, 0], &memory, |v| v.args[1] as i64), 0);
}

#[test]
fn aligned_bodies_stay_aligned() {
    let memory = memory(&[1; 65536]);
    for (nr, args) in [
        (0, [3, GUEST + 4096, 8192, 0, 0, 0]),
        (1, [3, GUEST + 4096, 8192, 0, 0, 0]),
        (18, [3, GUEST + 512, 512, 512, 0, 0]),
    ] {
        let ret = call(nr, args, &memory, |v| (v.args[1] % args[2].min(4096)) as i64);
        assert_eq!(ret, 0);
    }
}

#[test]
fn paths_and_structures() {
    let memory = pages(b"/etc/passwd\0");
    memory.map(GUEST + 0x1000, vec![7; 256], true);
    let ret = call(4, [GUEST, GUEST + 0x1000, 0, 0, 0, 0], &memory, |v| {
        assert_eq!(v.string(v.args[0]), b"/etc/passwd");
        let stat = v.args[1];
        v.at(stat, 144).fill(1);
        0
    });
    assert_eq!(ret, 0);
    assert_eq!(peek(&memory, GUEST + 0x1000, 144), [1; 144]);
    assert_eq!(peek(&memory, GUEST + 0x1000 + 144, 112), [7; 112]);
}

#[test]
fn a_path_without_an_end_is_for_the_kernel_to_refuse() {
    let memory = memory(&[b'x'; 8192]);
    let ret = call(80, [GUEST, 0, 0, 0, 0, 0], &memory, |v| {
        let path = v.args[0];
        assert!(v.at(path, 4096).iter().all(|&byte| byte == b'x'));
        -36
    });
    assert_eq!(ret, -36);
}

#[test]
fn lengths_that_are_values_and_results() {
    let memory = memory(&[7; 256]);
    memory.map(GUEST + 0x1000, 16u32.to_le_bytes().to_vec(), true);
    let ret = call(43, [3, GUEST, GUEST + 0x1000, 0, 0, 0], &memory, |v| {
        let (addr, len) = (v.args[1], v.args[2]);
        assert_eq!(v.u32_at(len), 16);
        v.at(addr, 16).fill(2);
        // The address was longer than the room.
        v.at(len, 4).copy_from_slice(&110u32.to_le_bytes());
        4
    });
    assert_eq!(ret, 4);
    assert_eq!(peek(&memory, GUEST, 17), [&[2; 16][..], &[7]].concat());
    assert_eq!(peek(&memory, GUEST + 0x1000, 4), 110u32.to_le_bytes());
    // No room wanted: both pointers null.
    assert_eq!(
        call(43, [3, 0, 0, 0, 0, 0], &memory, |v| (v.args[1] | v.args[2])
            as i64),
        0
    );
}

#[test]
fn a_length_word_never_promises_more_room_than_there_is() {
    let memory = memory(&[7; 0x20000]);
    memory.write(GUEST, &0x1_8000u32.to_le_bytes()).unwrap();
    // SO_PEERGROUPS
    call(55, [3, 1, 59, GUEST + 8, GUEST, 0], &memory, |v| {
        let (buf, len) = (v.args[3], v.args[4]);
        let room = v.u32_at(len) as usize;
        v.at(buf, room).fill(1);
        0
    });
    // A negative length is the kernel's to refuse.
    memory.write(GUEST, &(-1i32).to_le_bytes()).unwrap();
    assert_eq!(
        call(
            55,
            [3, 1, 59, GUEST + 8, GUEST, 0],
            &memory,
            |v| v.u32_at(v.args[4]) as i32 as i64
        ),
        -1
    );
}

#[test]
fn wait_writes_only_when_somebody_was_found() {
    let memory = memory(&[7; 256]);
    let args = [u64::MAX, GUEST, 1, GUEST + 16, 0, 0];
    assert_eq!(call(61, args, &memory, |_| 0), 0);
    assert_eq!(peek(&memory, GUEST, 256), [7; 256]);
    let ret = call(61, args, &memory, |v| {
        let (status, usage) = (v.args[1], v.args[3]);
        v.at(status, 4).fill(1);
        v.at(usage, 144).fill(2);
        42
    });
    assert_eq!(ret, 42);
    assert_eq!(peek(&memory, GUEST, 5), [1, 1, 1, 1, 7]);
    assert_eq!(peek(&memory, GUEST + 16, 145), [&[2; 144][..], &[7]].concat());
}

#[test]
fn clamped_counts_and_scaled_results() {
    let memory = memory(&[7; 0x40000]);
    let ret = call(232, [4, GUEST, 1 << 20, 100, 0, 0], &memory, |v| {
        let (events, max) = (v.args[1], v.args[2] as usize);
        v.at(events, max * 12);
        v.at(events, 24).fill(1);
        2
    });
    assert_eq!(ret, 2);
    assert_eq!(peek(&memory, GUEST, 25), [&[1; 24][..], &[7]].concat());
    let ret = call(217, [4, GUEST, 1 << 20, 0, 0, 0], &memory, |v| v.args[2] as i64);
    assert_eq!(ret, 65536);
    // A negative count is refused by the kernel.
    assert_eq!(
        call(
            232,
            [4, GUEST, 0xffff_ffff, 100, 0, 0],
            &memory,
            |v| v.args[2] as i32 as i64
        ),
        -1
    );
}

#[test]
fn select_and_poll() {
    let memory = memory(&[0xff; 256]);
    let ret = call(23, [70, GUEST, 0, GUEST + 64, GUEST + 128, 0], &memory, |v| {
        let (read, except, timeout) = (v.args[1], v.args[3], v.args[4]);
        assert_eq!(v.args[2], 0);
        assert_eq!(v.at(read, 16), [0xff; 16]);
        v.at(except, 16).fill(0);
        v.at(timeout, 16).fill(3);
        1
    });
    assert_eq!(ret, 1);
    assert_eq!(peek(&memory, GUEST + 63, 18)[1..17], [0; 16]);
    assert_eq!(peek(&memory, GUEST + 128, 17), [&[3; 16][..], &[0xff]].concat());
    // An interrupted call leaves the sets and tells what time is left.
    let ret = call(23, [70, GUEST, 0, 0, GUEST + 128, 0], &memory, |v| {
        v.at(v.args[4], 16).fill(9);
        v.at(v.args[1], 16).fill(0);
        -514
    });
    assert_eq!(ret, -514);
    assert_eq!(peek(&memory, GUEST, 16), [0xff; 16]);
    assert_eq!(peek(&memory, GUEST + 128, 16), [9; 16]);
    let ret = call(7, [GUEST, 2, 0, 0, 0, 0], &memory, |v| {
        v.at(v.args[0], 16)[6..8].fill(0);
        1
    });
    assert_eq!(ret, 1);
    assert_eq!(peek(&memory, GUEST + 6, 3), [0, 0, 0xff]);
}

#[test]
fn a_time_left_that_finds_no_place_is_no_error() {
    let memory = memory(&[0; 64]);
    memory.map(GUEST + 0x1000, vec![1; 16], false);
    assert_eq!(call(23, [1, GUEST, 0, 0, GUEST + 0x1000, 0], &memory, |_| 1), 1);
}

#[test]
fn temporary_masks_stay_here() {
    let memory = pages(&0x1234u64.to_le_bytes());
    memory.map(
        GUEST + 0x1000,
        [GUEST.to_le_bytes(), 8u64.to_le_bytes()].concat(),
        true,
    );
    let ppoll = gather(271, &[0, 0, 0, GUEST, 8, 0], &memory).unwrap();
    assert_eq!(ppoll.temp_mask, Some(0x1234));
    assert_eq!(make(&ppoll, &memory, |v| v.args[3] as i64), 0);
    let pselect = gather(270, &[0, 0, 0, 0, 0, GUEST + 0x1000], &memory).unwrap();
    assert_eq!(pselect.temp_mask, Some(0x1234));
    assert_eq!(make(&pselect, &memory, |v| v.args[5] as i64), 0);
    let epoll = gather(281, &[3, GUEST, 1, 0, GUEST, 8], &memory).unwrap();
    assert_eq!(epoll.temp_mask, Some(0x1234));
    // A size that the kernel refuses, and a pointer that it cannot read.
    for (mask, size) in [(GUEST, 16), (0x7000_0000_0000, 8)] {
        let ppoll = gather(271, &[0, 0, 0, mask, size, 0], &memory).unwrap();
        assert_eq!(ppoll.temp_mask, None);
        assert_eq!(make(&ppoll, &memory, |v| v.args[3] as i64), HOLE as i64);
    }
    memory.write(GUEST + 0x1008, &4u64.to_le_bytes()).unwrap();
    let pselect = gather(270, &[0, 0, 0, 0, 0, GUEST + 0x1000], &memory).unwrap();
    let size = make(&pselect, &memory, |v| {
        let pair = v.args[5];
        assert_eq!(v.u64_at(pair), HOLE);
        v.u64_at(pair + 8) as i64
    });
    assert_eq!(size, 4);
    assert_eq!(pselect.temp_mask, None);
}

#[test]
fn arguments_of_a_new_program() {
    let mut bytes = Vec::new();
    for pointer in [GUEST + 0x100, GUEST + 0x110, 0] {
        bytes.extend_from_slice(&u64::to_le_bytes(pointer));
    }
    bytes.resize(0x100, 0);
    bytes.extend_from_slice(b"/bin/true\0......argument\0");
    let memory = pages(&bytes);
    let ret = call(59, [GUEST + 0x100, GUEST, 0, 0, 0, 0], &memory, |v| {
        let argv = v.args[1];
        assert_eq!(v.args[2], 0);
        let (first, second) = (v.u64_at(argv), v.u64_at(argv + 8));
        assert_eq!(v.string(first), b"/bin/true");
        assert_eq!(v.string(second), b"argument");
        assert_eq!(v.u64_at(argv + 16), 0);
        -2
    });
    assert_eq!(ret, -2);
}

#[test]
fn commands_decide_what_an_argument_is() {
    let memory = memory(&[7; 256]);
    // F_SETFL, F_GETLK, TCGETS, TIOCSCTTY, PR_SET_NAME.
    assert_eq!(
        call(72, [1, 4, 2048, 0, 0, 0], &memory, |v| v.args[2] as i64),
        2048
    );
    call(72, [1, 5, GUEST, 0, 0, 0], &memory, |v| {
        v.at(v.args[2], 32).fill(1);
        0
    });
    assert_eq!(peek(&memory, GUEST, 33)[31..], [1, 7]);
    call(16, [1, 0x5401, GUEST, 0, 0, 0], &memory, |v| {
        v.at(v.args[2], 36).fill(2);
        0
    });
    assert_eq!(peek(&memory, GUEST, 37)[35..], [2, 7]);
    assert_eq!(
        call(16, [1, 0x540e, 1, 0, 0, 0], &memory, |v| v.args[2] as i64),
        1
    );
    memory.write(GUEST, b"name\0").unwrap();
    call(157, [15, GUEST, 0, 0, 0, 0], &memory, |v| {
        assert_eq!(v.string(v.args[1]), b"name");
        0
    });
    // prctl insists that unused arguments are zero.
    assert_eq!(call(157, [38, 1, 0, 0, 5, 0], &memory, |v| v.args[4] as i64), 5);
    for (nr, args) in [
        (16, [1, 0xdead_beef, GUEST, 0, 0, 0]),
        (72, [1, 4711, GUEST, 0, 0, 0]),
        (157, [4711, 0, 0, 0, 0, 0]),
        (54, [3, 1, 26, GUEST, 16, 0]),
        (55, [3, 6, 35, GUEST, GUEST, 0]),
    ] {
        assert_eq!(
            home_reason(gather(nr, &args, &memory)),
            HomeReason::UnknownCommand
        );
    }
    assert_eq!(
        home_reason(gather(54, &[3, 1, 60, GUEST, 4, 0], &memory)),
        HomeReason::ZeroCopy
    );
    assert_eq!(
        home_reason(gather(423, &[0; 6], &memory)),
        HomeReason::UnknownCall
    );
    assert_eq!(
        home_reason(gather(44, &[3, GUEST, 8, 0x400_0000, 0, 0], &memory)),
        HomeReason::ZeroCopy
    );
}

#[test]
fn interface_lists_have_a_buffer_behind_them() {
    let mut bytes = vec![0; 16];
    bytes[..4].copy_from_slice(&200u32.to_le_bytes());
    bytes[8..].copy_from_slice(&(GUEST + 0x1000).to_le_bytes());
    let memory = memory(&bytes);
    memory.map(GUEST + 0x1000, vec![7; 200], true);
    let ret = call(16, [3, 0x8912, GUEST, 0, 0, 0], &memory, |v| {
        let conf = v.args[2];
        let list = v.u64_at(conf + 8);
        assert_eq!(v.u32_at(conf), 200);
        v.at(list, 200)[..80].fill(1);
        v.at(conf, 4).copy_from_slice(&80u32.to_le_bytes());
        0
    });
    assert_eq!(ret, 0);
    assert_eq!(peek(&memory, GUEST + 0x1000, 81)[79..], [1, 7]);
    assert_eq!(peek(&memory, GUEST, 4), 80u32.to_le_bytes());
    assert_eq!(
        peek(&memory, GUEST + 8, 8),
        (GUEST + 0x1000).to_le_bytes(),
        "the guest's pointer stays"
    );
}

#[test]
fn message_queues_and_capabilities() {
    let memory = memory(&[7; 256]);
    let ret = call(70, [1, GUEST, 32, 0, 0, 0], &memory, |v| {
        v.at(v.args[1], 40)[..13].fill(1);
        5
    });
    assert_eq!(ret, 5);
    assert_eq!(peek(&memory, GUEST, 14)[12..], [1, 7]);
    memory.write(GUEST, &0x2008_0522u32.to_le_bytes()).unwrap();
    call(125, [GUEST, GUEST + 64, 0, 0, 0, 0], &memory, |v| {
        v.at(v.args[1], 24).fill(3);
        0
    });
    assert_eq!(peek(&memory, GUEST + 64, 25)[23..], [3, 7]);
}
