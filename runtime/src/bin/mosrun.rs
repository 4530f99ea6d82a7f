//! mosrun: starts a program that may run on any node of the cluster.

fn main() -> std::process::ExitCode {
    runtime::launcher::main()
}
