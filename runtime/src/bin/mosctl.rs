//! mosctl: looks at and changes a cluster; also called mosps, mosmigrate and mosmon.

fn main() -> std::process::ExitCode {
    runtime::cli::mosctl::main()
}
