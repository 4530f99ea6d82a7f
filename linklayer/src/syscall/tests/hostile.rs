use super::*;
use proptest::prelude::*;

/// Anything that a call may be given, with a liking for what is near the guest's memory.
fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0u64..0x3000).prop_map(|offset| GUEST + offset),
        2 => 0u64..64,
        1 => Just(0u64),
        1 => any::<u64>(),
        1 => prop_oneof![Just(u64::MAX), Just(i64::MAX as u64), Just(0x7fff_ffff), Just(0xffff_ffff_u64)],
        1 => 0u64..0x10_0000,
    ]
}

fn number() -> impl Strategy<Value = u32> {
    (0u32..=LATEST).prop_filter("a call of the table", |nr| row(*nr).is_some())
}

/// A command that the call of this number knows, if it is one of a family.
fn with_command(nr: u32, mut args: [u64; 6], pick: usize) -> [u64; 6] {
    let Some(row) = row(nr) else { return args };
    for arg in row.args {
        if let Kind::Sub(table) = arg.kind {
            let sub = &table.rows()[pick % table.rows().len()];
            for cmp in table.cmps(sub) {
                args[usize::from(cmp.arg)] = cmp.value;
            }
        }
    }
    args
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever a guest does, what is sent is well-formed, each pointer lies in the declared space, and a reply that
    /// fits is taken without a write outside of what the guest named.
    #[test]
    fn any_call_makes_a_sound_request(
        nr in number(),
        args in prop::array::uniform6(register()),
        pick in any::<usize>(),
        ret in prop_oneof![-600i64..600, any::<i64>()],
        content in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0x2000),
    ) {
        let memory = memory(&content);
        let args = with_command(nr, args, pick);
        let gathered = match gather(nr, &args, &memory) {
            Ok(gathered) => gathered,
            Err(GatherError::GoHome(_)) => return Ok(()),
            Err(GatherError::TooBig(mut transfer)) => {
                if let Step::Call(request) = transfer.next(&memory) {
                    let reply = answer(&request.clone(), |_| ret);
                    transfer.reply(Reply::parse(&reply).unwrap(), &memory).unwrap();
                    let _ = transfer.next(&memory);
                }
                return Ok(());
            }
        };
        prop_assert!(gathered.request.space as usize <= SLOT_DATA_LEN);
        let call = resolve(nr, &args);
        let result = make(&gathered, &memory, |v| {
            for index in 0..6 {
                let pointer = matches!(
                    call.kind(index),
                    Some(kind) if !matches!(kind, Kind::Val(_))
                );
                let seen = v.args[index];
                if pointer {
                    let inside = (BASE..=BASE + v.space as u64).contains(&seen);
                    assert!(inside || seen == HOLE || !(0x1_0000..0x7fff_ffff_f000).contains(&seen));
                }
            }
            ret
        });
        prop_assert!(result == ret || result == -14);
    }

    /// A deputy never panics on a request, and never writes or reads outside of the area.
    #[test]
    fn any_bytes_as_a_request(mut bytes in prop::collection::vec(any::<u8>(), 0..400), ret in any::<i64>(), tame in any::<bool>()) {
        if tame && bytes.len() >= 72 {
            // Counts that can fit, so that the records are looked at.
            let (relocs, outs) = (u32::from(bytes[8]) % 8, u32::from(bytes[12]) % 8);
            let image = (bytes.len() as u32 - 72).saturating_sub(relocs * 8 + outs * 16);
            bytes[4] %= 3;
            bytes[5..8].fill(0);
            bytes[8..12].copy_from_slice(&relocs.to_le_bytes());
            bytes[12..16].copy_from_slice(&outs.to_le_bytes());
            bytes[16..20].copy_from_slice(&image.to_le_bytes());
            bytes[20..24].copy_from_slice(&1000u32.to_le_bytes());
            for record in bytes[72..].chunks_mut(4) {
                if record.len() == 4 && record[0] & 1 == 0 {
                    record[1] = 0;
                    record[2] = 0;
                    record[3] &= 0x80;
                }
            }
        }
        if let Ok(view) = CallView::parse(&bytes) {
            let data = Data::new(0);
            place(&view, &data, BASE);
            collect(&view, &data, ret, &mut Vec::new());
            prop_assert!(data.0.borrow()[view.space as usize..].iter().all(|&byte| byte == 0));
        }
    }

    /// A supervisor never panics on a reply, and writes only where the guest said.
    #[test]
    fn any_bytes_as_a_reply(bytes in prop::collection::vec(any::<u8>(), 0..100), ret in any::<i64>()) {
        let memory = memory(&[7; 0x100]);
        let gathered = gather(45, &[3, GUEST + 0x20, 8, 0, GUEST + 0x40, GUEST + 0x60], &memory).unwrap();
        memory.write(GUEST + 0x60, &16u32.to_le_bytes()).unwrap();
        let _ = gathered.scatter(Reply::from_parts(ret, &bytes), &memory);
        for at in [0x0u64, 0x28, 0x64] {
            prop_assert_eq!(peek(&memory, GUEST + at, 0x18), vec![7; 0x18]);
        }
    }
}

#[test]
fn replies_must_fit_the_request() {
    let memory = memory(&[7; 0x100]);
    let gathered = gather(0, &[3, GUEST, 8, 0, 0, 0], &memory).unwrap();
    let too_long = [&9u32.to_le_bytes()[..], &[1; 9]].concat();
    assert_eq!(
        gathered.scatter(Reply::from_parts(9, &too_long), &memory),
        Err(Malformed::Offset)
    );
    let too_short = [&8u32.to_le_bytes()[..], &[1; 7]].concat();
    assert_eq!(
        gathered.scatter(Reply::from_parts(8, &too_short), &memory),
        Err(Malformed::Length)
    );
    let trailing = [&1u32.to_le_bytes()[..], &[1; 2]].concat();
    assert_eq!(
        gathered.scatter(Reply::from_parts(1, &trailing), &memory),
        Err(Malformed::Length)
    );
    assert!(Reply::parse(&[0; 7]).is_err());
}
