//! Benchmarks of the product in labs of two nodes on this machine, beside their peers in the same run: native programs, raw
//! UDP, ssh. Prints tables in Markdown. See `bench/README.md`.
//!
//! The same executable has three parts: outside it makes the labs; on node 1 (`--measure`) it measures; and as a program
//! under test (`--probe`) it computes, or makes calls.

mod lab;
mod measure;
mod probe;
mod stats;

use anyhow::{Context, bail};

/// What can be asked for.
const ALL: [&str; 7] = ["call", "cpu", "home", "start", "freeze", "whole", "slow"];

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--probe", what @ ..] => probe::run(what),
        ["--measure", what, setting] => measure::run(what, setting),
        ["--help" | "-h"] => {
            println!("cargo run --release -p bench [-- {}]", ALL.join(" | "));
            Ok(())
        }
        chosen => {
            if let Some(unknown) = chosen.iter().find(|c| !ALL.contains(c)) {
                bail!("{unknown} is none of {}", ALL.join(", "));
            }
            let chosen = if chosen.is_empty() { &ALL } else { chosen };
            lab::run(chosen).context("benchmarks")
        }
    }
}
