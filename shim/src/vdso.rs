//! The vDSO of another kernel (vdso(7)).
//!
//! A program has found the entry points of its vDSO at home, so the code must stay where it is and as it is, but it reads data pages
//! that only home's kernel fills. Where the kernels differ, home's bytes become plain memory in which every entry point leads
//! to the same one of this kernel's vDSO, or makes the system call.

use std::collections::BTreeMap;

/// Bytes of `movabs rax, target; jmp rax`.
const JUMP_LEN: u64 = 12;
const ELF_HEADER_LEN: u64 = 64;
const SECTION_LEN: u64 = 64;
const SYMBOL_LEN: u64 = 24;
const SHT_DYNSYM: u64 = 11;
const STT_FUNC: u64 = 2;
/// Symbols of a vDSO: today's have about a dozen.
const MAX_SYMBOLS: u64 = 256;

/// Why a vDSO cannot be replaced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VdsoError {
    /// It is no ELF file of the form that kernels make.
    #[error("a vDSO is malformed")]
    Malformed,
    /// It has a function that this kernel has not, and that is no system call.
    #[error("home's vDSO has the function {0}, which this node's has not")]
    Unknown(String),
    /// A function is too short to be led elsewhere.
    #[error("the function {0} of home's vDSO is too short to be replaced")]
    Short(String),
}

/// A function: where it begins, and its length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Function {
    offset: u64,
    len: u64,
}

fn bytes(image: &[u8], at: u64, len: u64) -> Result<&[u8], VdsoError> {
    let end = at.checked_add(len).ok_or(VdsoError::Malformed)?;
    image
        .get(usize::try_from(at).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX))
        .ok_or(VdsoError::Malformed)
}

fn number(image: &[u8], at: u64, len: u64) -> Result<u64, VdsoError> {
    Ok(bytes(image, at, len)?
        .iter()
        .rev()
        .fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// The `__vdso_*` functions of a vDSO by name (elf(5)).
fn functions(image: &[u8]) -> Result<BTreeMap<String, Function>, VdsoError> {
    if bytes(image, 0, ELF_HEADER_LEN)?[..6] != *b"\x7fELF\x02\x01" {
        return Err(VdsoError::Malformed);
    }
    let (sections, count) = (number(image, 40, 8)?, number(image, 60, 2)?);
    let section = |n: u64| -> Result<u64, VdsoError> {
        n.checked_mul(SECTION_LEN)
            .and_then(|o| o.checked_add(sections))
            .ok_or(VdsoError::Malformed)
    };
    let mut found = BTreeMap::new();
    for n in 0..count {
        let header = section(n)?;
        bytes(image, header, SECTION_LEN)?;
        if number(image, header + 4, 4)? != SHT_DYNSYM {
            continue;
        }
        let symbols = number(image, header + 24, 8)?;
        let how_many = (number(image, header + 32, 8)? / SYMBOL_LEN).min(MAX_SYMBOLS);
        let names_header = section(number(image, header + 40, 4)?)?;
        bytes(image, names_header, SECTION_LEN)?;
        let names = bytes(
            image,
            number(image, names_header + 24, 8)?,
            number(image, names_header + 32, 8)?,
        )?;
        for symbol in (0..how_many).map(|i| symbols.saturating_add(i * SYMBOL_LEN)) {
            bytes(image, symbol, SYMBOL_LEN)?;
            let (kind, home) = (number(image, symbol + 4, 1)? & 0xf, number(image, symbol + 6, 2)?);
            let name = names
                .get(number(image, symbol, 4)? as usize..)
                .ok_or(VdsoError::Malformed)?;
            let name = name.split(|b| *b == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            if kind == STT_FUNC && home != 0 && name.starts_with("__vdso_") {
                let function = Function {
                    offset: number(image, symbol + 8, 8)?,
                    len: number(image, symbol + 16, 8)?,
                };
                bytes(image, function.offset, function.len)?;
                found.insert(name.into_owned(), function);
            }
        }
    }
    Ok(found)
}

/// Code of a function that makes the system call `nr`.
fn system_call(nr: i64) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((nr as u32).to_le_bytes());
    code.extend([0x0f, 0x05, 0xc3]);
    code
}

/// The code for a function that this kernel's vDSO has not.
fn replacement(name: &str) -> Option<Vec<u8>> {
    let nr = match name {
        "__vdso_clock_gettime" => libc::SYS_clock_gettime,
        "__vdso_clock_getres" => libc::SYS_clock_getres,
        "__vdso_gettimeofday" => libc::SYS_gettimeofday,
        "__vdso_time" => libc::SYS_time,
        "__vdso_getcpu" => libc::SYS_getcpu,
        "__vdso_getrandom" => {
            // The question for the size of its state (r8 = -1) is answered with ENOSYS; with a state the call does the same.
            let mut code = vec![0x49, 0x83, 0xf8, 0xff, 0x74, 0x08];
            code.extend(system_call(libc::SYS_getrandom));
            code.extend([0x48, 0xc7, 0xc0]);
            code.extend((-libc::ENOSYS).to_le_bytes());
            code.push(0xc3);
            return Some(code);
        }
        _ => return None,
    };
    Some(system_call(nr))
}

/// Home's vDSO with its functions leading to those of this kernel's, `here`, which lies at `here_address`. Both are bytes of whole
/// areas; `home` may be hostile.
///
/// # Errors
/// See [`VdsoError`].
pub fn redirected(home: &[u8], here: &[u8], here_address: u64) -> Result<Vec<u8>, VdsoError> {
    let targets = functions(here)?;
    let mut patched = home.to_vec();
    for (name, function) in functions(home)? {
        let code = match targets.get(&name) {
            // The state of one kernel's getrandom is not that of another's.
            Some(target) if name != "__vdso_getrandom" => {
                let mut code = vec![0x48, 0xb8];
                code.extend((here_address + target.offset).to_le_bytes());
                code.extend([0xff, 0xe0]);
                debug_assert_eq!(code.len() as u64, JUMP_LEN);
                code
            }
            // It needs nothing but its caller's memory.
            None if name == "__vdso_sgx_enter_enclave" => continue,
            _ => replacement(&name).ok_or_else(|| VdsoError::Unknown(name.clone()))?,
        };
        if (code.len() as u64) > function.len {
            return Err(VdsoError::Short(name));
        }
        let at = function.offset as usize;
        patched[at..at + code.len()].copy_from_slice(&code);
    }
    Ok(patched)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::map_lines;
    use crate::memory::ProcessMemory;

    fn own() -> Vec<u8> {
        let pid = std::process::id() as i32;
        let line = map_lines(pid, false)
            .unwrap()
            .into_iter()
            .find(|l| l.path == b"[vdso]")
            .unwrap();
        let mut bytes = vec![0; (line.range.end - line.range.start) as usize];
        ProcessMemory::new(pid)
            .read_forced(line.range.start, &mut bytes)
            .unwrap();
        bytes
    }

    #[test]
    fn every_function_is_led_to_its_like() {
        let own = own();
        let found = functions(&own).unwrap();
        assert!(
            found.contains_key("__vdso_clock_gettime") && found.contains_key("__vdso_getcpu"),
            "{found:?}"
        );
        let patched = redirected(&own, &own, 0x7000_0000).unwrap();
        for (name, function) in &found {
            let at = function.offset as usize;
            match name.as_str() {
                "__vdso_getrandom" | "__vdso_sgx_enter_enclave" => {}
                _ => {
                    assert_eq!(patched[at..at + 2], [0x48, 0xb8], "{name}");
                    let target = u64::from_le_bytes(patched[at + 2..at + 10].try_into().unwrap());
                    assert_eq!(target, 0x7000_0000 + function.offset, "{name}");
                }
            }
            assert!(
                replacement(name).is_some() || name == "__vdso_sgx_enter_enclave",
                "{name}"
            );
        }
    }

    #[test]
    fn malformed_ones_are_refused_and_never_panic() {
        let own = own();
        assert_eq!(redirected(&[], &own, 0), Err(VdsoError::Malformed));
        assert_eq!(redirected(&own[..100], &own, 0), Err(VdsoError::Malformed));
        for at in 0..own.len().min(2048) {
            for value in [0x00, 0x7f, 0xff] {
                let mut broken = own.clone();
                broken[at] = value;
                let _ = redirected(&broken, &own, 0);
            }
        }
        // The section headers lie at the end.
        for at in own.len().saturating_sub(4096)..own.len() {
            let mut broken = own.clone();
            broken[at] = 0xff;
            let _ = redirected(&broken, &own, 0);
        }
    }
}
