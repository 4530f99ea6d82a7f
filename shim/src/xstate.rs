//! Extended register state (NT_X86_XSTATE) between CPUs that lay it out differently.
//!
//! ptrace(2) gives and takes it in the standard form of XSAVE: a legacy region of 512 bytes, a header of 64 bytes that says which
//! components are not in their initial state, and the components at offsets that are the CPU's own (CPUID leaf 0xd). It must have
//! exactly the size that the kernel expects.

use linklayer::image::XstateComponent;

/// Legacy region and header, bytes.
const HEADER_END: usize = 576;
/// Where the header begins: first the components in use, then the compaction mask.
const IN_USE: usize = 512;
/// Where the kernel tells which components it manages (the legacy region's room for software).
const MANAGED: usize = 464;
/// x87 and SSE, which are in the legacy region.
const LEGACY: u64 = 3;
const HIGHEST: u8 = 62;
/// Rights of protection keys (PKRU), and what Linux gives a program at first: no access but by key 0
/// (arch/x86/mm/pkeys.c, init_pkru_value).
const PKRU: u8 = 9;
const PKRU_AT_FIRST: u32 = 0x5555_5554;

/// Why a state cannot be had on this CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XstateError {
    /// It is too short, or names a component that it does not describe.
    #[error("extended register state is malformed")]
    Malformed,
    /// It uses registers that this CPU lacks or that have another size here.
    #[error("it uses the register set number {0}, which this node's CPU does not have alike")]
    Missing(u8),
}

/// Where this CPU has the components of a state (without the legacy ones).
pub fn layout() -> Vec<XstateComponent> {
    if std::arch::x86_64::__cpuid(0).eax < 0xd {
        return Vec::new();
    }
    (2..=HIGHEST)
        .filter_map(|number| {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, u32::from(number));
            // Bit 0 of ecx: supervisor state, which is none of a program's.
            (leaf.eax != 0 && leaf.ecx & 1 == 0).then_some(XstateComponent {
                number,
                offset: leaf.ebx,
                size: leaf.eax,
            })
        })
        .collect()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

/// A state of another CPU, laid out as `from`, in the layout `to` of this one. `sample` is a state that this kernel gave: its size and
/// what the kernel manages count.
///
/// # Errors
/// See [`XstateError`]. The state may be hostile.
pub fn convert(
    state: &[u8],
    from: &[XstateComponent],
    to: &[XstateComponent],
    sample: &[u8],
) -> Result<Vec<u8>, XstateError> {
    if state.len() < HEADER_END || sample.len() < HEADER_END {
        return Err(XstateError::Malformed);
    }
    let (in_use, managed) = (word(state, IN_USE), word(sample, MANAGED));
    let mut out = vec![0; sample.len()];
    out[..MANAGED].copy_from_slice(&state[..MANAGED]);
    out[MANAGED..IN_USE].copy_from_slice(&sample[MANAGED..IN_USE]);
    let mut kept = in_use;
    for number in (0..64).filter(|n| in_use & !LEGACY & 1 << n != 0) {
        let find = |layout: &[XstateComponent]| layout.iter().copied().find(|c| c.number == number);
        let source = find(from).ok_or(XstateError::Malformed)?;
        let range = |c: XstateComponent| c.offset as usize..c.offset as usize + c.size as usize;
        let bytes = state.get(range(source)).ok_or(XstateError::Malformed)?;
        let target = find(to).filter(|t| t.size == source.size && managed & 1 << number != 0);
        match target.and_then(|t| out.get_mut(range(t))) {
            Some(target) => target.copy_from_slice(bytes),
            // A processor may call a component used that is as it was at first, which is all zeros (Intel SDM volume 1, 13.6).
            None if bytes.iter().all(|b| *b == 0) => kept &= !(1 << number),
            // Memory with other keys than 0 does not leave home, so that there is nothing that this could forbid.
            None if number == PKRU && bytes.starts_with(&PKRU_AT_FIRST.to_le_bytes()) => {
                kept &= !(1 << number)
            }
            None => return Err(XstateError::Missing(number)),
        }
    }
    let rights = |layout: &[XstateComponent]| layout.iter().copied().find(|c| c.number == PKRU);
    if let (None, Some(target)) = (rights(from), rights(to))
        && managed & 1 << PKRU != 0
    {
        // It comes from where there is no such register.
        let at = target.offset as usize;
        let place = out.get_mut(at..at + 4).ok_or(XstateError::Malformed)?;
        place.copy_from_slice(&PKRU_AT_FIRST.to_le_bytes());
        kept |= 1 << PKRU;
    }
    out[IN_USE..IN_USE + 8].copy_from_slice(&kept.to_le_bytes());
    Ok(out)
}

/// Whether a state of a CPU with the layout `from` can be had on this one.
///
/// # Errors
/// See [`XstateError`]. The state may be hostile.
pub fn fits(state: &[u8], from: &[XstateComponent]) -> Result<(), XstateError> {
    let here = layout();
    if state.is_empty() || (here == from && state.len() >= HEADER_END) {
        return Ok(());
    }
    let end = |c: &XstateComponent| c.offset as usize + c.size as usize;
    let mut sample = vec![0; here.iter().map(end).max().unwrap_or(HEADER_END).max(HEADER_END)];
    sample[MANAGED..MANAGED + 8].fill(0xff);
    convert(state, from, &here, &sample).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(number: u8, offset: u32, size: u32) -> XstateComponent {
        XstateComponent { number, offset, size }
    }

    fn state(len: usize, in_use: u64, managed: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = 0x7f;
        bytes[MANAGED..MANAGED + 8].copy_from_slice(&managed.to_le_bytes());
        bytes[IN_USE..IN_USE + 8].copy_from_slice(&in_use.to_le_bytes());
        bytes
    }

    #[test]
    fn components_move_to_their_places() {
        let (from, to) = (
            [component(2, 576, 256), component(9, 832, 8)],
            [
                component(2, 576, 256),
                component(5, 832, 64),
                component(9, 2688, 8),
            ],
        );
        let mut source = state(840, 0x205, 0x207);
        source[600] = 9;
        source[832] = 5;
        let sample = state(2696, 0, 0x2e7);
        let out = convert(&source, &from, &to, &sample).unwrap();
        assert_eq!((out.len(), out[0], out[600], out[2688]), (2696, 0x7f, 9, 5));
        assert_eq!((word(&out, IN_USE), word(&out, MANAGED)), (0x205, 0x2e7));
        // And back, unless something is in use that is not there.
        assert_eq!(convert(&out, &to, &from, &source).unwrap()[..840], source[..]);
        let mut more = state(2696, 0x20, 0x2e7);
        more[832] = 1;
        assert_eq!(convert(&more, &to, &from, &source), Err(XstateError::Missing(5)));
        // What is as it was at first is nothing that could be missed.
        more[832] = 0;
        let out = convert(&more, &to, &from, &source).unwrap();
        assert_eq!((out.len(), word(&out, IN_USE)), (840, 0));
    }

    #[test]
    fn rights_of_protection_keys_are_what_linux_gives_at_first() {
        let (without, with) = (
            [component(2, 576, 256)],
            [component(2, 576, 256), component(9, 832, 8)],
        );
        let (small, large) = (state(832, 0, 7), state(840, 0, 0x207));
        let there = convert(&small, &without, &with, &large).unwrap();
        assert_eq!(word(&there, IN_USE), 0x200);
        assert_eq!(there[832..836], PKRU_AT_FIRST.to_le_bytes());
        let back = convert(&there, &with, &without, &small).unwrap();
        assert_eq!((back.len(), word(&back, IN_USE)), (832, 0));
        let mut own = there;
        own[832] = 0;
        assert_eq!(
            convert(&own, &with, &without, &small),
            Err(XstateError::Missing(9))
        );
    }

    #[test]
    fn malformed_states_are_refused() {
        let to = [component(2, 576, 256)];
        let sample = state(832, 0, 7);
        assert_eq!(convert(&[0; 100], &[], &to, &sample), Err(XstateError::Malformed));
        assert_eq!(
            convert(&state(832, 1 << 60, 7), &to, &to, &sample),
            Err(XstateError::Malformed)
        );
        let wide = [component(2, u32::MAX, u32::MAX)];
        assert_eq!(
            convert(&state(832, 4, 7), &wide, &to, &sample),
            Err(XstateError::Malformed)
        );
        assert_eq!(
            convert(&[&state(576, 4, 7)[..], &[1; 256]].concat(), &to, &wide, &sample),
            Err(XstateError::Missing(2))
        );
    }

    #[test]
    fn this_cpus_layout_lies_in_order_behind_the_header() {
        for component in layout() {
            assert!(
                component.offset as usize >= HEADER_END && component.size > 0,
                "{component:?}"
            );
        }
    }
}
