//! mosd: the daemon of a node.

fn main() -> std::process::ExitCode {
    runtime::cli::mosd::main()
}
