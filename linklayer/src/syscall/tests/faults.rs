use super::*;
use crate::memory::USER_END;

const NOWHERE: u64 = 0x7000_0000_0000;
const EFAULT: i64 = -14;

/// What a kernel does with a pointer: it is either the hole, or the same in every process.
fn sees(nr: u32, args: [u64; 6], memory: &LocalMemory, index: usize) -> u64 {
    call(nr, args, memory, |v| v.args[index] as i64) as u64
}

#[test]
fn bad_pointers_are_bad_at_home_as_well() {
    let memory = pages(b"x\0");
    memory.map(GUEST + 0x1000, vec![0; 256], false);
    for bad in [NOWHERE, GUEST + 0x5000] {
        assert_eq!(sees(1, [1, bad, 8, 0, 0, 0], &memory, 1), HOLE);
        assert_eq!(sees(0, [1, bad, 8, 0, 0, 0], &memory, 1), HOLE);
        assert_eq!(sees(2, [bad, 0, 0, 0, 0, 0], &memory, 0), HOLE);
        assert_eq!(sees(22, [bad, 0, 0, 0, 0, 0], &memory, 0), HOLE);
        assert_eq!(sees(20, [1, bad, 1, 0, 0, 0], &memory, 1), HOLE);
        assert_eq!(sees(46, [1, bad, 0, 0, 0, 0], &memory, 1), HOLE);
        assert_eq!(sees(233, [1, 1, 1, bad, 0, 0], &memory, 3), HOLE);
        assert_eq!(sees(43, [1, GUEST, bad, 0, 0, 0], &memory, 2), HOLE);
        assert_eq!(sees(59, [bad, 0, 0, 0, 0, 0], &memory, 0), HOLE);
        assert_eq!(sees(59, [GUEST, bad, 0, 0, 0, 0], &memory, 1), HOLE);
    }
    // Read-only memory is no place for descriptors that nobody could close.
    assert_eq!(sees(22, [GUEST + 0x1000, 0, 0, 0, 0, 0], &memory, 0), HOLE);
    assert_eq!(sees(0, [1, GUEST + 0x1000, 8, 0, 0, 0], &memory, 1), HOLE);
    // These mean the same in every process.
    for same in [0, 1, 0xfff, USER_END, u64::MAX, 0xffff_8000_0000_0000] {
        assert_eq!(sees(1, [1, same, 8, 0, 0, 0], &memory, 1), same);
        assert_eq!(sees(2, [same, 0, 0, 0, 0, 0], &memory, 0), same);
    }
    // A range that ends outside of user memory is refused as a whole.
    assert_eq!(
        sees(0, [1, GUEST, i64::MAX as u64, 0, 0, 0], &memory, 1),
        USER_END
    );
}

#[test]
fn results_without_a_place_give_efault() {
    let memory = pages(b"/\0");
    assert_eq!(call(4, [GUEST, NOWHERE, 0, 0, 0, 0], &memory, |_| 0), EFAULT);
    assert_eq!(
        call(4, [GUEST, NOWHERE, 0, 0, 0, 0], &memory, |_| -2),
        -2,
        "the kernel's own error comes first"
    );
    assert_eq!(call(63, [NOWHERE, 0, 0, 0, 0, 0], &memory, |_| 0), EFAULT);
    assert_eq!(call(79, [NOWHERE, 64, 0, 0, 0, 0], &memory, |_| 5), EFAULT);
}

#[test]
fn results_need_only_the_room_that_they_take() {
    let memory = memory(&[0; 8]);
    let ret = call(79, [GUEST, 4096, 0, 0, 0, 0], &memory, |v| {
        v.at(v.args[0], 8).copy_from_slice(b"/a/b/c/\0");
        8
    });
    assert_eq!(ret, 8);
    assert_eq!(peek(&memory, GUEST, 8), b"/a/b/c/\0");
}

#[test]
fn a_body_of_which_a_part_is_there_goes_home() {
    let memory = memory(&[0; 64]);
    for (nr, args) in [
        (0, [1, GUEST + 32, 64, 0, 0, 0]),
        (1, [1, GUEST + 32, 64, 0, 0, 0]),
        (217, [1, GUEST + 32, 64, 0, 0, 0]),
        (45, [1, GUEST + 32, 64, 0, 0, 0]),
    ] {
        assert_eq!(
            home_reason(gather(nr, &args, &memory)),
            HomeReason::PartialBuffer,
            "{nr}"
        );
    }
}

#[test]
fn vectors_are_refused_for_the_kernels_reasons() {
    let entry = |base: u64, len: u64| [base.to_le_bytes(), len.to_le_bytes()].concat();
    let memory = memory(
        &[
            entry(GUEST, 8),
            entry(GUEST, u64::MAX),
            entry(NOWHERE, 8),
            entry(USER_END, 8),
        ]
        .concat(),
    );
    // More entries than the kernel takes: it says so, whatever the pointer.
    assert_eq!(sees(20, [1, GUEST, 1025, 0, 0, 0], &memory, 1), HOLE);
    // A length below zero arrives as it is.
    call(20, [1, GUEST, 2, 0, 0, 0], &memory, |v| {
        let iov = v.args[1];
        assert_eq!((v.u64_at(iov + 8), v.u64_at(iov + 24)), (8, u64::MAX));
        -22
    });
    // A bad first body is a bad pointer; a later one would have ended the call in the middle.
    call(20, [1, GUEST + 32, 1, 0, 0, 0], &memory, |v| {
        let iov = v.args[1];
        assert_eq!((v.u64_at(iov), v.u64_at(iov + 8)), (HOLE, 8));
        EFAULT
    });
    call(20, [1, GUEST + 48, 1, 0, 0, 0], &memory, |v| {
        let iov = v.args[1];
        assert_eq!((v.u64_at(iov), v.u64_at(iov + 8)), (USER_END, 8));
        EFAULT
    });
    memory.write(GUEST + 16, &entry(NOWHERE, 8)).unwrap();
    assert_eq!(
        home_reason(gather(20, &[1, GUEST, 2, 0, 0, 0], &memory)),
        HomeReason::PartialBuffer
    );
    assert_eq!(
        home_reason(gather(19, &[1, GUEST, 2, 0, 0, 0], &memory)),
        HomeReason::PartialBuffer
    );
}
