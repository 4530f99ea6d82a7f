//! The table for readers: as text for a terminal, as a document, and a call as a line of a log.

use super::kind::{Blocking, Dir, Disposition, HomeReason, Kind, Row, Rule, Scalar, Size, SubRow};
use super::sub::SubTable;
use super::{groups, resolve, rows};
use std::fmt::Write as _;

/// A disposition in one word, and its detail in a few.
fn disposition(disposition: Disposition) -> (&'static str, String) {
    match disposition {
        Disposition::Local => ("local", String::new()),
        Disposition::Forward => ("forward", String::new()),
        Disposition::Split(kind) => ("split", format!("{kind:?}")),
        Disposition::GoHome(reason) => ("home", reason.text().to_string()),
    }
}

fn short(what: Disposition) -> String {
    match disposition(what) {
        (word, detail) if detail.is_empty() => word.to_string(),
        (word, detail) => format!("{word} ({detail})"),
    }
}

fn blocking(blocking: Blocking) -> &'static str {
    match blocking {
        Blocking::Never => "",
        Blocking::May => "may wait",
        Blocking::Long => "waits",
    }
}

fn kind_text(kind: Kind) -> String {
    let arrow = |dir| match dir {
        Dir::In => "<",
        Dir::Out => ">",
        Dir::InOut => "<>",
    };
    match kind {
        Kind::Val(Scalar::Addr) => "*".to_string(),
        Kind::Val(_) => String::new(),
        Kind::Str(_) => "<str".to_string(),
        Kind::Buf(buf) => match buf.size {
            Size::Fixed(len) => format!("{}{len}", arrow(buf.dir)),
            _ => format!("{}n", arrow(buf.dir)),
        },
        Kind::StrArray => "<str[]".to_string(),
        Kind::Iovec { dir, .. } => format!("{}iovec", arrow(dir)),
        Kind::Msg(dir) => format!("{}msghdr", arrow(dir)),
        Kind::Mmsg { dir, .. } => format!("{}mmsghdr", arrow(dir)),
        Kind::TempMask { .. } | Kind::TempMaskPair => "mask".to_string(),
        Kind::MqNotify => "<64".to_string(),
        Kind::Ifconf => "<>16".to_string(),
        Kind::Sub(_) => "by command".to_string(),
    }
}

fn signature(args: &[super::kind::Arg]) -> String {
    let mut text = String::new();
    for arg in args {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push_str(arg.name);
        let kind = kind_text(arg.kind);
        if !kind.is_empty() {
            let _ = write!(text, ": {kind}");
        }
    }
    text
}

fn rule_text(rule: &Rule) -> String {
    let mut text = String::new();
    for cmp in rule.when {
        let sep = if text.is_empty() { "" } else { " and " };
        let _ = match cmp.mask {
            0xffff_ffff => write!(text, "{sep}argument {} is {}", cmp.arg, cmp.value as u32 as i32),
            _ if cmp.mask == cmp.value => write!(text, "{sep}argument {} has {:#x}", cmp.arg, cmp.value),
            _ => write!(
                text,
                "{sep}argument {} & {:#x} is {:#x}",
                cmp.arg, cmp.mask, cmp.value
            ),
        };
    }
    format!("{} if {text}", short(rule.then))
}

fn remarks(row: &Row) -> String {
    let mut parts: Vec<String> = Vec::new();
    if !blocking(row.blocking).is_empty() {
        parts.push(blocking(row.blocking).to_string());
    }
    if row.cache.is_some() {
        parts.push("cached".to_string());
    }
    let mut rules = row.rules.iter();
    parts.extend(rules.by_ref().take(3).map(rule_text));
    if rules.next().is_some() {
        parts.push(format!("and {} more by argument", row.rules.len() - 3));
    }
    let mut text = parts.join("; ");
    if !row.note.is_empty() {
        if !text.is_empty() {
            text.push_str(". ");
        }
        text.push_str(row.note);
    }
    text
}

fn sub_code(table: SubTable, row: &SubRow) -> String {
    match table {
        SubTable::SetSockopt | SubTable::GetSockopt => format!("{}/{}", row.code >> 32, row.code as u32),
        SubTable::Ioctl | SubTable::ArchPrctl => format!("{:#x}", row.code),
        _ if row.code > 0xffff => format!("{:#x}", row.code),
        _ => row.code.to_string(),
    }
}

/// The whole table as a Markdown document (`docs/SYSCALLS.md`).
pub fn markdown() -> String {
    let mut text = String::new();
    text.push_str("# System calls\n\n");
    text.push_str("Generated from the table in `linklayer/src/syscall` by `mosctl syscalls --markdown`.\n\n");
    text.push_str("Where a call of a process that is away from home runs:\n\n");
    text.push_str("- **local**: on the node where the process is;\n");
    text.push_str("- **forward**: at home, by the process's home half;\n");
    text.push_str("- **split**: both sides have a part in it;\n");
    text.push_str("- **home**: the process goes home, and the call runs there natively.\n\n");
    text.push_str(
        "A call that is not listed goes home. Arguments: `<` is read by the kernel, `>` written, the ",
    );
    text.push_str(
        "number is a size in bytes, `n` depends on another argument, `*` is an address that is not ",
    );
    text.push_str("followed at home.\n");
    for (title, group) in groups() {
        let _ = write!(text, "\n## {title}\n\n");
        text.push_str("| nr | call | arguments | runs | remarks |\n|--:|---|---|---|---|\n");
        for row in group {
            let _ = writeln!(
                text,
                "| {} | `{}` | {} | {} | {} |",
                row.nr,
                row.name,
                escaped(&signature(row.args)),
                short(row.disposition),
                escaped(&remarks(row))
            );
        }
    }
    for table in SubTable::ALL {
        let _ = write!(text, "\n## `{}` by command\n\n", table.name());
        text.push_str("| code | command | arguments | runs | remarks |\n|--:|---|---|---|---|\n");
        for row in table.rows() {
            let mut remark = blocking(row.blocking).to_string();
            if !row.note.is_empty() {
                let sep = if remark.is_empty() { "" } else { ". " };
                let _ = write!(remark, "{sep}{}", row.note);
            }
            let _ = writeln!(
                text,
                "| {} | `{}` | {} | {} | {} |",
                sub_code(table, row),
                row.name,
                escaped(&signature(row.args)),
                short(row.disposition),
                escaped(&remark)
            );
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
        .replace('<', "&lt;")
        .replace('*', "\\*")
        .replace('_', "\\_")
}

/// The table for a terminal: a line per call, by number; with `commands`, the sub-tables as well.
pub fn text(commands: bool) -> String {
    let mut text = String::new();
    let line = |text: &mut String, code: &str, name: &str, runs: &str, remark: &str| {
        let line = format!("{code:>12}  {name:<26} {runs:<38} {remark}");
        text.push_str(line.trim_end());
        text.push('\n');
    };
    for row in rows() {
        line(
            &mut text,
            &row.nr.to_string(),
            row.name,
            &short(row.disposition),
            &remarks(row),
        );
    }
    if commands {
        for table in SubTable::ALL {
            let _ = write!(text, "\n{} by command:\n", table.name());
            for row in table.rows() {
                line(
                    &mut text,
                    &sub_code(table, row),
                    row.name,
                    &short(row.disposition),
                    row.note,
                );
            }
        }
    }
    text
}

/// A call as a line of a log, `name(argument, ...)`, without what is behind its pointers.
pub fn format_call(nr: u32, args: &[u64; 6]) -> String {
    let call = resolve(nr, args);
    let Some(row) = call.row else {
        return format!("syscall_{nr}({})", args.map(|arg| format!("{arg:#x}")).join(", "));
    };
    let mut text = format!("{}(", row.name);
    let sub = call.sub.map_or(&[][..], |sub| sub.args);
    let own = row
        .args
        .iter()
        .take_while(|arg| !matches!(arg.kind, Kind::Sub(_)));
    for (index, arg) in own.chain(sub).enumerate().take(6) {
        if index > 0 {
            text.push_str(", ");
        }
        let is_command = call.sub.is_some() && index + 1 == row.args.len() - 1;
        let _ = match (call.sub, arg.kind) {
            (Some(sub), _) if is_command => write!(text, "{}", sub.name),
            (_, Kind::Val(scalar)) => match scalar {
                Scalar::Fd if args[index] as i32 == -100 => write!(text, "AT_FDCWD"),
                Scalar::Flags | Scalar::Addr => write!(text, "{:#x}", args[index]),
                Scalar::Mode => write!(text, "{:#o}", args[index] as u32),
                _ => write!(text, "{}", scalar.value(args[index])),
            },
            _ if args[index] == 0 => write!(text, "NULL"),
            _ => write!(text, "{:#x}", args[index]),
        };
    }
    text.push(')');
    if let Disposition::GoHome(reason @ (HomeReason::UnknownCall | HomeReason::UnknownCommand)) =
        call.disposition
    {
        let _ = write!(text, " [{}]", reason.text());
    }
    text
}
