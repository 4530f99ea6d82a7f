//! `mosrun`'s command line.
//!
//! Two of MOSIX's habits need help before clap sees the arguments: `-2` is an option with a number for a name, and
//! everything from PROGRAM on belongs to the program, even where it looks like an option of ours ([`normalise`]).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, ValueEnum};

use crate::placement::{NodeList, NodeRef, Want};

/// Whose CPU count and topology a program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Topology {
    /// Those of its home node.
    Home,
    /// Those of the node where it runs.
    #[default]
    Node,
}

/// What processors a program may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Cpu {
    /// All that home's can do; it runs on nodes that can do as much.
    #[default]
    Home,
    /// What all can do: the C library is told so (GLIBC_TUNABLES), for programs that leave the choice to it.
    Baseline,
}

/// Run a program that may run on any node of the cluster, and stays a process of this one for everybody who looks.
///
/// Without an option, and with -b, the program starts on the least loaded node that answers, this one included; without a
/// daemon or a cluster it runs here. Its exit status is mosrun's. mosrun itself writes nothing to the program's standard
/// output or error unless asked to.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "mosrun",
    version,
    disable_help_flag = true,
    override_usage = "mosrun [-r NODE | -NUMBER | -h | -b | -j LIST] [OPTIONS] [--] PROGRAM [ARG]...",
    after_help = "Exit status: the program's own; 125 when mosrun could not start it (the node is down, for example), \
                  126 when it is not executable, 127 when it was not found, 2 for a wrong command line.",
    max_term_width = 100
)]
pub struct Args {
    /// Start on this node: a number, the node's name, its host name or address
    #[arg(short = 'r', value_name = "NODE", group = "where")]
    pub node: Option<NodeRef>,

    /// Start on the node of this number (0: here); written as -2, for example
    #[arg(
        long = "number",
        value_name = "NUMBER",
        group = "where",
        hide_long_help = false
    )]
    pub number: Option<u32>,

    /// Start at home, that is here
    #[arg(short = 'h', group = "where")]
    pub home: bool,

    /// Start on the best node (this is what happens without an option, too)
    #[arg(short = 'b', group = "where")]
    pub best: bool,

    /// Start on a node drawn at random from a list such as 1-3,5
    #[arg(short = 'j', value_name = "LIST", group = "where")]
    pub draw: Option<NodeList>,

    /// Let a call that can be done exactly only at home fail with ENOSYS, instead of bringing the process home
    #[arg(short = 'e')]
    pub error: bool,

    /// Say so on standard error when a process goes home because of a call (with -e: when such a call fails)
    #[arg(short = 'w', conflicts_with = "silent")]
    pub warn: bool,

    /// Do not say so (the default)
    #[arg(short = 'u')]
    pub silent: bool,

    /// When the node is down, go on at home, with a notice; otherwise that is an error and the program is not started
    #[arg(short = 'F')]
    pub fallback: bool,

    /// Lock: a process moves only when somebody asks for it; what it executes runs where it is
    #[arg(short = 'L', conflicts_with = "unlock")]
    pub lock: bool,

    /// Unlock: what is executed is placed anew (the default)
    #[arg(short = 'l')]
    pub unlock: bool,

    /// Say on standard error what mosrun does; twice: say more
    #[arg(short = 'v', action = ArgAction::Count)]
    pub verbose: u8,

    /// Write what mosrun does to this file
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// CPU count and topology that the program sees: home's, or those of the node where it runs
    #[arg(long, value_enum, default_value_t = Topology::Node, value_name = "WHOSE")]
    pub topology: Topology,

    /// Instructions that the program may use: those of home's processor, or those that all processors have
    #[arg(long, value_enum, default_value_t = Cpu::Home, value_name = "WHICH")]
    pub cpu: Cpu,

    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,

    /// The program and its arguments
    #[arg(required = true, value_name = "PROGRAM [ARG]")]
    pub command: Vec<OsString>,
}

impl Args {
    /// Parses a command line, `argv[0]` included.
    ///
    /// # Errors
    /// clap's, which [`clap::Error::exit`] prints and turns into status 2 (0 for `--help` and `--version`).
    pub fn parse_args(argv: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = Self::command().try_get_matches_from(normalise(argv.into_iter().collect()))?;
        Self::from_arg_matches(&matches)
    }

    /// Parses this process's command line, and ends the process when it makes no sense.
    pub fn parse_or_exit() -> Self {
        Self::parse_args(std::env::args_os()).unwrap_or_else(|e| e.exit())
    }

    /// Where the program is to start.
    pub fn want(&self) -> Want {
        match self {
            Args { home: true, .. } => Want::Home,
            Args { node: Some(node), .. } => Want::Node(node.clone()),
            Args {
                number: Some(number), ..
            } => Want::Node(NodeRef::Number(*number)),
            Args { draw: Some(list), .. } => Want::Drawn(list.clone()),
            _ => Want::Best,
        }
    }

    /// The program's name, as it was given.
    pub fn program(&self) -> &OsStr {
        &self.command[0]
    }
}

/// Short options that take a value.
const SHORT_WITH_VALUE: &[u8] = b"rj";
/// Long options that take one.
const LONG_WITH_VALUE: &[&str] = &["--number", "--log", "--topology", "--cpu"];

/// Rewrites `-2` as `--number=2`, and puts `--` before the program.
fn normalise(argv: Vec<OsString>) -> Vec<OsString> {
    let mut out = Vec::with_capacity(argv.len() + 1);
    let mut rest = argv.into_iter();
    out.extend(rest.next());
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        match bytes {
            b"--" => {
                out.push(arg);
                break;
            }
            [b'-', b'-', ..] => {
                let takes_next = LONG_WITH_VALUE.iter().any(|l| l.as_bytes() == bytes);
                out.push(arg);
                out.extend(takes_next.then(|| rest.next()).flatten());
            }
            [b'-', digits @ ..] if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
                let mut number = OsString::from("--number=");
                number.push(OsStr::from_bytes(digits));
                out.push(number);
            }
            [b'-', letters @ ..] if !letters.is_empty() => {
                // in a cluster such as -vr the first letter that takes a value takes the rest, or the next argument
                let taker = letters.iter().position(|c| SHORT_WITH_VALUE.contains(c));
                let takes_next = taker.is_some_and(|at| at + 1 == letters.len());
                out.push(arg);
                out.extend(takes_next.then(|| rest.next()).flatten());
            }
            _ => {
                out.push("--".into());
                out.push(arg);
                break;
            }
        }
    }
    out.extend(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::parse_args(
            std::iter::once("mosrun")
                .chain(line.split_whitespace())
                .map(OsString::from),
        )
    }

    fn want(line: &str) -> Want {
        parse(line).unwrap().want()
    }

    fn node(text: &str) -> Want {
        Want::Node(text.parse().unwrap())
    }

    #[test]
    fn clap_agrees_with_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn where_to_start() {
        assert_eq!(want("true"), Want::Best);
        assert_eq!(want("-b true"), Want::Best);
        assert_eq!(want("-h true"), Want::Home);
        assert_eq!(want("-r 2 true"), node("2"));
        assert_eq!(want("-r2 true"), node("2"));
        assert_eq!(want("-vr host true"), node("host"));
        assert_eq!(want("-17 true"), node("17"));
        assert_eq!(want("-0 true"), node("0"));
        assert_eq!(want("-j1-3,5 true"), Want::Drawn(NodeList(vec![1, 2, 3, 5])));
        assert_eq!(want("-j 2 -- -5"), Want::Drawn(NodeList(vec![2])));
    }

    #[test]
    fn the_programs_arguments_are_its_own() {
        for line in [
            "-v -2 prog -r -3 --help -- -h",
            "-v -2 -- prog -r -3 --help -- -h",
        ] {
            let args = parse(line).unwrap();
            assert_eq!(
                args.command,
                ["prog", "-r", "-3", "--help", "--", "-h"].map(OsString::from),
                "{line}"
            );
            assert_eq!((args.verbose, args.want()), (1, node("2")));
        }
        let args = parse("--log f --topology home -FLw prog").unwrap();
        assert!(args.fallback && args.lock && args.warn && !args.error);
        assert_eq!((args.log, args.topology), (Some("f".into()), Topology::Home));
        assert_eq!(parse("--cpu baseline p").unwrap().cpu, Cpu::Baseline);
        let odd = OsString::from(OsStr::from_bytes(b"-\xff"));
        let args = Args::parse_args(["mosrun".into(), "p".into(), odd.clone()]).unwrap();
        assert_eq!(args.command[1], odd);
    }

    #[test]
    fn nonsense_is_refused_with_status_2() {
        for line in [
            "",
            "-r",
            "-r 1",
            "-h -b true",
            "-2 -r 3 true",
            "-w -u true",
            "-L -l true",
            "-j 1-x true",
            "-j true",
            "--bogus true",
            "-Q true",
            "--topology mars true",
            "--cpu z80 true",
            "-99999999999 true",
            "-v",
            "--",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        assert_eq!(parse("--help").unwrap_err().exit_code(), 0);
        assert_eq!(parse("--version").unwrap_err().exit_code(), 0);
    }
}
