//! Tells the crate which system calls there are, so that a call that the table lacks ends the build: those of
//! `x86_64.list`, and those of this machine's kernel headers where they are installed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

const LIST: &str = "src/syscall/x86_64.list";
const HEADERS: [&str; 2] = [
    "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "/usr/include/asm/unistd_64.h",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={LIST}");
    let mut calls = BTreeMap::new();
    let list = std::fs::read_to_string(LIST).unwrap_or_else(|error| panic!("cannot read {LIST}: {error}"));
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let (number, name) = line
            .split_once(' ')
            .unwrap_or_else(|| panic!("{LIST}: bad line: {line}"));
        let number: u32 = number
            .parse()
            .unwrap_or_else(|_| panic!("{LIST}: bad number: {line}"));
        calls.insert(number, name.to_string());
    }
    for header in HEADERS.into_iter().filter(|header| Path::new(header).exists()) {
        println!("cargo:rerun-if-changed={header}");
        for line in std::fs::read_to_string(header).unwrap_or_default().lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("#define") {
                continue;
            }
            let (Some(name), Some(number)) = (words.next(), words.next()) else {
                continue;
            };
            if let (Some(name), Ok(number)) = (name.strip_prefix("__NR_"), number.parse()) {
                calls.entry(number).or_insert_with(|| name.to_string());
            }
        }
    }
    let mut code = String::from("const KERNEL: &[(u32, &str)] = &[\n");
    for (number, name) in calls {
        let _ = writeln!(code, "    ({number}, {name:?}),");
    }
    code.push_str("];\n");
    let out = std::env::var("OUT_DIR").unwrap_or_else(|_| panic!("cargo sets OUT_DIR"));
    let path = Path::new(&out).join("kernel_calls.rs");
    std::fs::write(&path, code).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
