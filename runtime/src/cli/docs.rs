//! Man pages and shell completions, from the definitions by which command lines are parsed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use super::{mosctl, mosd, mosrun};
use crate::daemon::config::TEMPLATE;

/// Write the man pages of all programs
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory, such as /usr/local/share/man: pages go to its man1, man5 and man8
    dir: PathBuf,
}

/// Print the completions of all programs for a shell
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,

    /// Of this program only (zsh wants a file for each)
    #[arg(value_parser = ["mosrun", "mosd", "mosctl", "mosps", "mosmigrate", "mosmon"])]
    program: Option<String>,
}

/// The definitions of all programs, with the sections of their man pages.
fn programs() -> Vec<(Command, &'static str)> {
    let mut all = vec![
        (mosrun::Args::command(), "1"),
        (mosd::Args::command(), "8"),
        (mosctl::Cli::command(), "1"),
    ];
    all.extend(
        mosctl::NAMES
            .iter()
            .filter_map(|(name, _)| Some((mosctl::named(name)?, "1"))),
    );
    all
}

fn write_page(dir: &Path, command: Command, section: &str) -> anyhow::Result<()> {
    let dir = dir.join(format!("man{section}"));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let file = dir.join(format!("{}.{section}", command.get_name()));
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .section(section)
        .render(&mut page)?;
    std::fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))
}

/// A page for each verb of a program, down to the last.
fn write_verbs(dir: &Path, command: &Command, section: &str) -> anyhow::Result<()> {
    for verb in command
        .get_subcommands()
        .filter(|v| !v.is_hide_set() && v.get_name() != "help")
    {
        let name: &'static str = format!("{}-{}", command.get_name(), verb.get_name()).leak();
        let renamed = verb
            .clone()
            .name(name)
            .display_name(name)
            .version(env!("CARGO_PKG_VERSION"));
        write_verbs(dir, &renamed, section)?;
        write_page(dir, renamed, section)?;
    }
    Ok(())
}

/// The page of the configuration file, from the template that is written for new nodes.
fn config_page() -> String {
    let mut page = String::from(
        ".TH mosd.toml 5\n.SH NAME\nmosd.toml \\- configuration of mosd\n.SH DESCRIPTION\n\
         Read from \\fI/etc/mosrun/mosd.toml\\fR, for a plain user's daemon from \
         \\fI~/.config/mosrun/mosd.toml\\fR, or from the file named with \\fB\\-\\-config\\fR. \
         The format is TOML. An unknown key is an error.\n.SH KEYS AND DEFAULTS\n.nf\n",
    );
    for line in TEMPLATE.lines() {
        // zero-width space first: a line that begins with a dot or a quote is an order to troff
        page += &format!("\\&{}\n", line.replace('\\', "\\e").replace('-', "\\-"));
    }
    page + ".fi\n.SH SEE ALSO\nmosd(8), mosctl(1)\n"
}

impl ManArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        for (mut command, section) in programs() {
            // settles what is inherited and generated
            command.build();
            write_verbs(&self.dir, &command, section)?;
            write_page(&self.dir, command, section)?;
        }
        let dir = self.dir.join("man5");
        let written = std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(dir.join("mosd.toml.5"), config_page()));
        written.with_context(|| format!("cannot write to {}", dir.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl CompletionsArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut text = Vec::new();
        for (mut command, _) in programs() {
            let name = command.get_name().to_string();
            if self.program.as_ref().is_none_or(|p| *p == name) {
                clap_complete::generate(self.shell, &mut command, name, &mut text);
            }
        }
        std::io::stdout().lock().write_all(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_verb_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        ManArgs {
            dir: dir.path().to_owned(),
        }
        .run()
        .unwrap();
        for page in [
            "man1/mosrun.1",
            "man8/mosd.8",
            "man1/mosctl.1",
            "man1/mosps.1",
            "man1/mosmigrate.1",
            "man1/mosmon.1",
            "man1/mosctl-status.1",
            "man1/mosctl-cluster-invite.1",
            "man1/mosctl-lab-up.1",
            "man5/mosd.toml.5",
        ] {
            let text = std::fs::read_to_string(dir.path().join(page)).expect(page);
            assert!(text.contains(".SH NAME") && text.contains(".SH"), "{page}");
        }
        assert!(!dir.path().join("man8/mosd-supervise.8").exists());
    }

    #[test]
    fn every_shell_has_completions() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            for (mut command, _) in programs() {
                let name = command.get_name().to_string();
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut command, name.clone(), &mut text);
                assert!(String::from_utf8(text).unwrap().contains(&name));
            }
        }
    }
}
