//! What processors can do, as far as it matters to programs.
//!
//! A program finds out once what its processor can do, and uses it from then on. So it can run only where all of that is
//! there. Names are those of the flags of `/proc/cpuinfo` (arch/x86/include/asm/cpufeatures.h).

use std::io::{BufRead, BufReader};

/// Flags that stand for instructions that user code may execute. What is only faster, or only for kernels, is not here.
const INSTRUCTIONS: [&str; 88] = [
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx10_1",
    "avx10_2",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int16",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmpccxadd",
    "cx16",
    "cx8",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fxsr",
    "gfni",
    "lahf_lm",
    "mmx",
    "movbe",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pni",
    "popcnt",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
];

/// What every x86-64 processor has, and XSAVE, with which the dynamic loader saves registers.
const BASELINE: [&str; 9] = [
    "clflush", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2", "rdtscp", "xsave",
];

/// glibc's switch that keeps it from choosing newer instructions (ld.so(8), GLIBC_TUNABLES).
pub const GLIBC_BASELINE: &str = "glibc.cpu.hwcaps=-ADX,-AES,-AVX,-AVX2,-AVX512BW,-AVX512CD,-AVX512DQ,-AVX512ER,-AVX512F,-AVX512PF,\
-AVX512VL,-BMI1,-BMI2,-ERMS,-FMA,-FMA4,-FSRM,-LZCNT,-MOVBE,-POPCNT,-RTM,-SSE4_1,-SSE4_2,-SSSE3,-XSAVEC";

/// Most flags that a peer may name.
pub const MAX_FLAGS: usize = 256;

/// The instructions that this machine's programs may use; none when it does not tell. Only the first processor is read: the
/// kernel takes time for each.
pub fn here() -> Vec<String> {
    let Ok(file) = std::fs::File::open("/proc/cpuinfo") else {
        return Vec::new();
    };
    let mut lines = BufReader::new(file).lines().map_while(Result::ok);
    let flags = lines.find(|l| l.starts_with("flags")).unwrap_or_default();
    instructions(&flags)
}

/// The instructions that a machine's programs may use, from the text of its `/proc/cpuinfo`.
fn instructions(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .and_then(|l| l.split_once(':'))
        .map_or("", |(_, flags)| flags);
    let mut found: Vec<String> = flags
        .split_whitespace()
        .filter(|f| INSTRUCTIONS.contains(f))
        .map(str::to_owned)
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Those of them that programs use which were told to make do with what all processors have.
pub fn baseline(instructions: &[String]) -> Vec<String> {
    let common = |f: &&String| BASELINE.contains(&f.as_str());
    instructions.iter().filter(common).cloned().collect()
}

/// What a program that may use `wanted` would miss on a processor that has `here`.
pub fn missing<'a>(wanted: &'a [String], here: &[String]) -> Vec<&'a str> {
    let lacks = |f: &&String| !here.contains(f);
    wanted.iter().filter(lacks).map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_order_and_agree() {
        assert!(INSTRUCTIONS.is_sorted());
        assert!(BASELINE.iter().all(|f| INSTRUCTIONS.contains(f)));
        assert!(INSTRUCTIONS.len() <= MAX_FLAGS);
    }

    #[test]
    fn only_what_user_code_can_execute_counts() {
        let new = instructions(
            "processor\t: 0\nflags\t\t: fpu sse2 avx2 pti sse4_2 xsave constant_tsc\nbugs\t: \n",
        );
        assert_eq!(new, ["avx2", "sse2", "sse4_2", "xsave"]);
        let old = instructions("flags : sse2 xsave hypervisor");
        assert_eq!(missing(&new, &old), ["avx2", "sse4_2"]);
        assert!(missing(&old, &new).is_empty());
        assert!(missing(&baseline(&new), &old).is_empty());
        assert!(instructions("no such line").is_empty());
    }

    #[test]
    fn this_machine_has_what_all_have() {
        let here = here();
        assert!(
            ["sse2", "cx8"].iter().all(|f| here.iter().any(|h| h == f)),
            "{here:?}"
        );
    }
}
