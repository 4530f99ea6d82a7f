//! Files about the guest or the node that only this side knows: /proc/self/maps and the like, and the CPUs.
//!
//! They are read here, put into home's words (pids, paths), and opened at home as a descriptor with that content, so
//! that the descriptor is one of the process as all others are.

use linklayer::syscall::Row;
use linklayer::wire::{self, Kind, Named};

use super::calls::{Call, Outcome};

/// Longest path that can name one of these files, bytes.
const LONGEST: usize = 96;

/// What a path means to this module.
#[derive(Debug, PartialEq, Eq)]
enum Special {
    Maps(&'static str),
    Status,
    Stat,
    Statm,
    /// The memory itself of this process.
    Memory(i32),
    /// A file of this node.
    Node,
}

/// open(2), openat(2), openat2(2), creat(2).
pub(super) fn open(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let nr = i64::from(call.nr);
    let (path, flags) = match nr {
        libc::SYS_open => (call.args[0], call.args[1] as i32),
        libc::SYS_openat => (call.args[1], call.args[2] as i32),
        _ => return Ok(call.forward(row)),
    };
    let Ok(path) = linklayer::memory::GuestMemory::read_string(&call.thread.guest.memory, path, LONGEST)
    else {
        return Ok(call.forward(row));
    };
    let Some(path) = path.strip_suffix(&[0]).and_then(|p| std::str::from_utf8(p).ok()) else {
        return Ok(call.forward(row));
    };
    let Some(special) = special(
        path,
        call.thread.guest.pid,
        call.shared
            .topology_of_home
            .load(std::sync::atomic::Ordering::Acquire),
    ) else {
        return Ok(call.forward(row));
    };
    if let Special::Memory(of) = special {
        return Ok(call.works_on(Named::Thread(of), path));
    }
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Ok(call.forward(row));
    }
    let guest = &call.thread.guest;
    // Of the first thread; whoever reads this is another one then.
    let ended = guest.ended.lock().contains(&guest.outer);
    let by = if ended { guest.memory.pid() } else { guest.outer };
    let local = |name: &str| std::fs::read_to_string(format!("/proc/{by}/{name}"));
    let content = match special {
        Special::Maps(name) => local(name).map(|text| home_maps(call, &text)),
        Special::Statm => local("statm"),
        Special::Status => {
            local("status").and_then(|here| Ok(merge_status(&home_file(call, path)?, &here, ended)))
        }
        Special::Stat => local("stat").and_then(|here| Ok(merge_stat(&home_file(call, path)?, &here, ended))),
        Special::Node | Special::Memory(_) => std::fs::read_to_string(path),
    };
    let Ok(content) = content else {
        return Ok(call.forward(row));
    };
    let body = wire::Synthetic {
        name: path.as_bytes().to_vec(),
        flags,
        content: content.into_bytes(),
    };
    let tid = call.thread.tid;
    let answer = call
        .shared
        .ask(tid, tid, Kind::Synthetic, &wire::encode(&body))
        .map_err(|_| Outcome::Handled)?;
    let ret = answer
        .as_slice()
        .try_into()
        .map(i64::from_le_bytes)
        .map_err(|_| Outcome::Handled)?;
    Ok(Outcome::Value(ret))
}

fn special(path: &str, pid: i32, topology_of_home: bool) -> Option<Special> {
    if let Some(rest) = path.strip_prefix("/sys/devices/system/cpu/") {
        let file = matches!(rest, "online" | "possible" | "present");
        return (file && !topology_of_home).then_some(Special::Node);
    }
    let rest = path.strip_prefix("/proc/")?;
    if rest == "cpuinfo" {
        return (!topology_of_home).then_some(Special::Node);
    }
    let (who, file) = rest.split_once('/')?;
    let whose = match who {
        "self" | "thread-self" => pid,
        number => number.parse().ok()?,
    };
    let of_a_thread = file.strip_prefix("task/").and_then(|rest| rest.split_once('/'));
    if matches!(of_a_thread.map_or(file, |(_, file)| file), "mem" | "pagemap") {
        return Some(Special::Memory(whose));
    }
    if whose != pid {
        return None;
    }
    match file {
        "maps" => Some(Special::Maps("maps")),
        "smaps" => Some(Special::Maps("smaps")),
        "smaps_rollup" => Some(Special::Maps("smaps_rollup")),
        "status" => Some(Special::Status),
        "stat" => Some(Special::Stat),
        "statm" => Some(Special::Statm),
        _ => None,
    }
}

/// A file of /proc as home has it.
fn home_file(call: &Call, path: &str) -> std::io::Result<String> {
    let tid = call.thread.tid;
    let bytes = call
        .shared
        .ask(tid, tid, Kind::ReadProc, path.as_bytes())
        .map_err(std::io::Error::other)?;
    String::from_utf8(bytes).map_err(std::io::Error::other)
}

/// Puts home's names into a maps file: the memfds that stand for home's files get their paths, devices and inodes.
fn home_maps(call: &Call, text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        match line.split_once("/memfd:mosrun-").and_then(|(head, id)| {
            let id = id.split_whitespace().next()?.parse().ok()?;
            Some((head, call.shared.files.known(id)?))
        }) {
            Some((head, file)) => {
                // address perms offset dev inode
                let mut fields = head.split_whitespace();
                let (a, p, o) = (fields.next(), fields.next(), fields.next());
                let (major, minor) = (libc::major(file.key.dev), libc::minor(file.key.dev));
                let prefix = format!(
                    "{} {} {} {major:02x}:{minor:02x} {} ",
                    a.unwrap_or_default(),
                    p.unwrap_or_default(),
                    o.unwrap_or_default(),
                    file.key.ino
                );
                out.push_str(&format!("{prefix:<73}{}", String::from_utf8_lossy(&file.path)));
            }
            None if line.contains(shim::capture::HELD) => out.push_str(&held_line(call, line)),
            None => out.push_str(&line.replace("/memfd:mosrun-shared (deleted)", "/dev/zero (deleted)")),
        }
        out.push('\n');
    }
    out
}

/// A line of a maps file about a held file, in home's words.
fn held_line(call: &Call, line: &str) -> String {
    let id = line.split_once(shim::capture::HELD).map_or("", |(_, id)| id);
    let id = id.split_whitespace().next().and_then(|id| id.parse().ok());
    let Some(file) = id.and_then(|id| call.shared.held.known(id)) else {
        return line.into();
    };
    let fields: Vec<&str> = line.split_whitespace().take(3).collect();
    let (major, minor) = (libc::major(file.dev), libc::minor(file.dev));
    let prefix = format!("{} {major:02x}:{minor:02x} {} ", fields.join(" "), file.ino);
    format!("{prefix:<73}{}", String::from_utf8_lossy(&file.path))
}

/// /proc/PID/status: memory, threads and signal masks are the guest's, everything else is home's.
fn merge_status(home: &str, here: &str, ended: bool) -> String {
    // Who looks at its own status finds no tracer: natively there is none.
    let untraced = "TracerPid:\t0";
    let ours = |name: &str| {
        name.starts_with("Vm")
            || name.starts_with("Rss")
            || matches!(
                name,
                "Threads"
                    | "SigPnd"
                    | "ShdPnd"
                    | "SigBlk"
                    | "HugetlbPages"
                    | "Cpus_allowed"
                    | "Cpus_allowed_list"
            )
    };
    let mut out = String::with_capacity(home.len());
    for line in home.lines() {
        let name = line.split(':').next().unwrap_or_default();
        let replaced = ours(name)
            .then(|| here.lines().find(|l| l.split(':').next() == Some(name)))
            .flatten()
            .unwrap_or(line);
        out.push_str(match name {
            "TracerPid" => untraced,
            // Whoever reads this runs.
            "State" if ended => "State:\tZ (zombie)",
            "State" => "State:\tR (running)",
            _ => replaced,
        });
        out.push('\n');
    }
    out
}

/// /proc/PID/stat: faults, times, threads, memory and masks (fields 10-17, 20, 23-24, 31-32, 39) are the guest's.
fn merge_stat(home: &str, here: &str, ended: bool) -> String {
    let parse = |s: &str| {
        let end = s.rfind(')').unwrap_or(0);
        let (head, tail) = s.split_at((end + 1).min(s.len()));
        (
            head.to_string(),
            tail.split_whitespace().map(str::to_string).collect::<Vec<_>>(),
        )
    };
    let (head, mut fields) = parse(home);
    let (_, local) = parse(here);
    if let Some(state) = fields.first_mut() {
        (if ended { "Z" } else { "R" }).clone_into(state);
    }
    for number in [10, 11, 12, 13, 14, 15, 16, 17, 20, 23, 24, 31, 32, 39] {
        // The first field behind the name is number 3.
        let at = number - 3;
        if let (Some(f), Some(l)) = (fields.get_mut(at), local.get(at)) {
            f.clone_from(l);
        }
    }
    format!("{head} {}\n", fields.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_about_the_guest_and_the_cpus_are_special() {
        assert_eq!(special("/proc/self/maps", 7, false), Some(Special::Maps("maps")));
        assert_eq!(special("/proc/7/status", 7, false), Some(Special::Status));
        assert_eq!(special("/proc/8/status", 7, false), None);
        assert_eq!(special("/proc/self/fd", 7, false), None);
        assert_eq!(special("/proc/self/mem", 7, false), Some(Special::Memory(7)));
        assert_eq!(special("/proc/7/task/9/mem", 7, false), Some(Special::Memory(7)));
        assert_eq!(special("/proc/8/mem", 7, false), Some(Special::Memory(8)));
        assert_eq!(
            special("/proc/8/task/9/pagemap", 7, false),
            Some(Special::Memory(8))
        );
        assert_eq!(special("/proc/8/memory", 7, false), None);
        assert_eq!(
            special("/sys/devices/system/cpu/online", 7, false),
            Some(Special::Node)
        );
        assert_eq!(special("/sys/devices/system/cpu/online", 7, true), None);
        assert_eq!(special("/etc/passwd", 7, false), None);
    }

    #[test]
    fn stat_keeps_homes_identity_and_takes_the_guests_memory() {
        let field = |mark: &str| {
            (3..=52)
                .map(|n| format!("{mark}{n}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let merged = merge_stat(
            &format!("7 (a) b) {}", field("h")),
            &format!("99 (x) {}", field("g")),
            false,
        );
        assert!(merged.starts_with("7 (a) b) R h4 h5"));
        assert!(merged.contains(" g23 g24 h25 "));
        assert!(merged.ends_with("h52\n"));
    }

    #[test]
    fn status_takes_the_guests_threads() {
        let merged = merge_status(
            "Name:\ta\nThreads:\t2\nPid:\t7\n",
            "Name:\tb\nThreads:\t1\nPid:\t99\n",
            false,
        );
        assert_eq!(merged, "Name:\ta\nThreads:\t1\nPid:\t7\n");
    }
}
