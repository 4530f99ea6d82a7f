use linklayer::syscall::resolve;

use super::*;

/// struct seccomp_data.
struct Data {
    nr: u32,
    arch: u32,
    address: u64,
    args: [u64; 6],
}

impl Data {
    fn call(nr: u32, args: [u64; 6]) -> Data {
        Data {
            nr,
            arch: ARCH_X86_64,
            address: 0x1234_5678_9abc,
            args,
        }
    }

    fn word(&self, offset: u32) -> u32 {
        let mut bytes = Vec::new();
        bytes.extend(self.nr.to_le_bytes());
        bytes.extend(self.arch.to_le_bytes());
        bytes.extend(self.address.to_le_bytes());
        for arg in self.args {
            bytes.extend(arg.to_le_bytes());
        }
        let at = offset as usize;
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }
}

/// What the kernel does with a program: its result, and whether it looked at anything but number and architecture.
fn run(program: &Program, data: &Data) -> (u32, bool) {
    let code = program.instructions();
    let (mut pc, mut a, mut looked) = (0, 0u32, false);
    let mut scratch = [0u32; 16];
    loop {
        let i = code[pc];
        pc += 1;
        let jump = |condition: bool| usize::from(if condition { i.if_true } else { i.if_false });
        match i.code {
            LD_ABS => {
                looked |= i.k > OFFSET_ARCH;
                a = data.word(i.k);
            }
            JA => pc += i.k as usize,
            JEQ => pc += jump(a == i.k),
            JGE => pc += jump(a >= i.k),
            0x25 => pc += jump(a > i.k),
            0x45 => pc += jump(a & i.k != 0),
            0x54 => a &= i.k,
            0x02 => scratch[i.k as usize] = a,
            0x60 => a = scratch[i.k as usize],
            RET => return (i.k, looked),
            code => panic!("instruction {code:#x}"),
        }
    }
}

const TRACE: u32 = 0x7ff0_0000 | TRACE_CLONE as u32;
const TRACE_OF_WAIT: u32 = 0x7ff0_0000 | TRACE_WAIT as u32;

fn table() -> Program {
    Program::new(&Rules::from_table(), None).unwrap()
}

#[test]
fn the_filter_agrees_with_the_table() {
    let program = table();
    println!("{} instructions", program.instructions().len());
    // Values that the rules of the table look at, and others.
    let mut interesting: Vec<u64> = vec![
        0,
        1,
        2,
        3,
        0x22,
        0x32,
        0x21,
        0x2022,
        0x4022,
        0x4_0022,
        0x1_0000_0000,
        u64::MAX,
    ];
    for lists in Rules::from_table().allow_when.values() {
        for cmp in lists.iter().flatten() {
            interesting.extend([cmp.value, cmp.value ^ 1, cmp.value | !cmp.mask]);
        }
    }
    interesting.sort_unstable();
    interesting.dedup();
    for nr in 0..700 {
        for first in &interesting {
            for (index, other) in interesting
                .iter()
                .enumerate()
                .filter(|(i, _)| i % 3 == 0 || nr == 9)
            {
                let mut args = [*first, *other, 7, *other, *first, 0];
                if index % 2 == 0 {
                    args[1] = *first;
                }
                let expected = match resolve(nr, &args).disposition {
                    Disposition::Local => RET_ALLOW,
                    Disposition::Split(SplitKind::Clone) => TRACE,
                    Disposition::Split(SplitKind::SignalWait) => TRACE_OF_WAIT,
                    _ => RET_NOTIFY,
                };
                let (got, _) = run(&program, &Data::call(nr, args));
                assert_eq!(got, expected, "nr {nr} args {args:x?}");
            }
        }
    }
}

#[test]
fn what_always_passes_is_decided_by_the_number_alone() {
    let pass = Pass::random(None).unwrap();
    let program = Program::new(&Rules::from_table(), Some(&pass)).unwrap();
    for nr in Rules::from_table().allow {
        assert_eq!(
            run(&program, &Data::call(nr, [9; 6])),
            (RET_ALLOW, false),
            "nr {nr}"
        );
        assert!(!is_notified(nr));
    }
    assert!(is_notified(libc::SYS_read as u32) && is_notified(libc::SYS_mmap as u32) && is_notified(9999));
    assert!(!is_notified(libc::SYS_clone as u32) && !is_notified(libc::SYS_getpid as u32));
}

#[test]
fn other_architectures_do_not_slip_through() {
    for (foreign, action) in [
        (ForeignArch::Notify, RET_NOTIFY),
        (ForeignArch::Kill, RET_KILL_PROCESS),
    ] {
        let rules = Rules {
            foreign,
            ..Rules::from_table()
        };
        let pass = Pass::random(None).unwrap();
        let program = Program::new(&rules, Some(&pass)).unwrap();
        for nr in rules
            .allow
            .iter()
            .chain(rules.trace.keys())
            .chain(rules.allow_when.keys())
        {
            let i386 = Data {
                arch: 0x4000_0003,
                ..Data::call(*nr, pass.args([0]))
            };
            assert_eq!(run(&program, &i386).0, action, "nr {nr}");
            let x32 = Data::call(*nr | X32_BIT, [0; 6]);
            assert_eq!(run(&program, &x32).0, RET_NOTIFY, "nr {nr}");
        }
    }
}

#[test]
fn only_the_pass_passes() {
    let address = 0x7fff_1234_5678;
    let rules = Rules::from_table();
    let free = Pass::random(None).unwrap();
    let bound = Pass::random(Some(address)).unwrap();
    assert_ne!(free.key(), bound.key());
    assert!(!format!("{free:?}").contains(&free.key().to_string()));
    for (pass, place, expected) in [
        (&free, 0, RET_ALLOW),
        (&bound, address + 2, RET_ALLOW),
        (&bound, address, RET_NOTIFY),
        (&bound, address + 2 + (1 << 32), RET_NOTIFY),
    ] {
        let program = Program::new(&rules, Some(pass)).unwrap();
        let data = |key: u64| Data {
            address: place,
            ..Data::call(libc::SYS_close as u32, [0, 0, 0, 0, 0, key])
        };
        assert_eq!(run(&program, &data(pass.key())).0, expected);
        for wrong in [
            0,
            pass.key() ^ 1,
            pass.key() ^ (1 << 32),
            pass.key() as u32 as u64,
            u64::MAX,
        ] {
            assert_eq!(run(&program, &data(wrong)).0, RET_NOTIFY);
        }
    }
}

#[test]
fn conditions_on_one_argument_are_merged() {
    let cmp = |arg, mask, value| Cmp { arg, mask, value };
    assert_eq!(
        merged(&[cmp(1, 0xf, 3), cmp(1, 0xf0, 0x20), cmp(0, 1, 1)])
            .unwrap()
            .len(),
        2
    );
    assert!(merged(&[cmp(1, 0xf, 3), cmp(1, 0x1, 0)]).is_none());
    assert!(merged(&[cmp(1, 0xf, 0x10)]).is_none());
    let rules = Rules {
        allow_when: BTreeMap::from([(
            5,
            vec![
                vec![cmp(1, 0xf, 3), cmp(1, 0xff, 0x23)],
                vec![cmp(2, u64::MAX, 1 << 40)],
            ],
        )]),
        ..Rules::default()
    };
    let program = Program::new(&rules, None).unwrap();
    let decide = |args| run(&program, &Data::call(5, args)).0;
    assert_eq!(decide([0, 0x123, 0, 0, 0, 0]), RET_ALLOW);
    assert_eq!(decide([0, 0x133, 0, 0, 0, 0]), RET_NOTIFY);
    assert_eq!(decide([0, 0, 1 << 40, 0, 0, 0]), RET_ALLOW);
    assert_eq!(decide([0, 0, 0, 0, 0, 0]), RET_NOTIFY);
}

#[test]
fn a_long_list_is_cut_into_pieces() {
    let rules = Rules {
        allow: (0..1000).collect(),
        ..Rules::default()
    };
    let program = Program::new(&rules, None).unwrap();
    for nr in [0, 199, 200, 999] {
        assert_eq!(run(&program, &Data::call(nr, [0; 6])).0, RET_ALLOW);
    }
    assert_eq!(run(&program, &Data::call(1000, [0; 6])).0, RET_NOTIFY);
}
