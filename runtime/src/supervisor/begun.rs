//! Processes whose building has begun before they are known: their pages are put into them as they come.
//!
//! When somebody says what memory a process has that is going to come (`wire::Prefetch`), a blank process gets that memory, and the link
//! of the process a [`Room`] by which it puts pages there. What the process is comes in the end, and is made of it then
//! (`supervisor/build.rs`). Whatever prevents this costs time and nothing else: pages are kept, then, until the process is built.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use anyhow::Context;
use crossbeam_channel::Sender;
use linklayer::image::{Area, Clocks};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use shim::cage::{Cage, CageOptions};
use shim::ptrace::{self, Status, Stopped, Target};
use shim::restore::{Room, Shell};

use super::tracer::Tracer;

/// An order to begin.
pub struct Begin {
    /// Of the process.
    pub pid: i32,
    /// Of the link by which it comes.
    pub number: u64,
    /// Home's host name.
    pub hostname: Vec<u8>,
    /// How far home's clocks are ahead of this node's.
    pub ahead: Clocks,
    /// Its private memory, as in a valid image.
    pub areas: Vec<Area>,
    /// Who gets the place for its pages.
    pub done: Sender<Result<Room, String>>,
}

/// A process that has begun.
pub(super) struct Begun {
    number: u64,
    outer: i32,
    shell: Shell,
    /// By which it gets descriptors, and the number of its end inside.
    socket: OwnedFd,
    inside: i32,
}

/// Those that have begun.
pub(super) type AllBegun = HashMap<i32, Begun>;

impl Tracer {
    /// Begins to build a process.
    pub(super) fn begin(&mut self, begin: Begin) {
        let Begin { pid, number, .. } = begin;
        if self.begun.get(&pid).is_some_and(|begun| begun.number > number) {
            // It was long in coming: its files had to be fetched first.
            let _ = begin.done.send(Err("it comes by a later link".into()));
            return;
        }
        // An older link of the same process is of no use any more.
        self.abandon(pid, None);
        let room = self.try_begin(&begin).map_err(|e| format!("{e:#}"));
        if begin.done.send(room).is_err() {
            self.abandon(pid, Some(number));
        }
    }

    fn try_begin(&mut self, begin: &Begin) -> anyhow::Result<Room> {
        let pid = begin.pid;
        let former = self.shared.guests.read().get(&pid).cloned();
        anyhow::ensure!(
            former.is_none_or(|guest| guest.vacated.load(Ordering::Acquire)),
            "it is here"
        );
        // It was here, and its memory is being given back.
        self.await_end(pid)?;
        self.make_cage(begin.ahead, &begin.hostname)?;
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let (outer, stopped, inside) = self.blank(pid, &[theirs.as_fd()])?;
        let made = Shell::new(stopped).and_then(|mut shell| {
            shell.make(&begin.areas)?;
            let room = shell.room()?;
            Ok((shell, room))
        });
        let (shell, room) = match made {
            Ok(made) => made,
            Err(e) => {
                self.remove_half_built(pid);
                return Err(e.into());
            }
        };
        let begun = Begun {
            number: begin.number,
            outer,
            shell,
            socket,
            inside: inside.first().copied().unwrap_or(-1),
        };
        self.begun.insert(pid, begun);
        Ok(room)
    }

    /// What has begun of a process is not needed: all of it, or what a link began.
    pub(super) fn abandon(&mut self, pid: i32, number: Option<u64>) {
        let of_link = |begun: &Begun| number.is_none_or(|number| begun.number == number);
        if !self.begun.get(&pid).is_some_and(of_link) {
            return;
        }
        let Some(begun) = self.begun.remove(&pid) else {
            return;
        };
        let outer = begun.outer;
        drop(begun);
        self.remove_half_built(pid);
        // Its number has to be free when the process comes after all.
        while let Ok(Some((_, Status::Stopped(_)))) = ptrace::wait(Target::Thread(outer), false) {}
    }

    /// A blank process for the guest: begun already by this link, or made now. It has these descriptors, whose numbers in it come last.
    pub(super) fn shell(
        &mut self,
        pid: i32,
        number: Option<u64>,
        fds: &[BorrowedFd<'_>],
    ) -> anyhow::Result<(i32, Shell, Vec<i32>)> {
        let begun = self.begun.get(&pid).map(|begun| begun.number);
        if let Some(number) = number {
            anyhow::ensure!(begun == Some(number), "what had begun of it is gone");
            let mut begun = self.begun.remove(&pid).context("what had begun of it")?;
            let inside = begun
                .shell
                .give(begun.socket.as_fd(), begun.inside, fds)
                .context("its files")?;
            return Ok((begun.outer, begun.shell, inside));
        }
        self.abandon(pid, None);
        let (outer, stopped, inside) = self.blank(pid, fds)?;
        Ok((outer, Shell::new(stopped).context("new process")?, inside))
    }

    /// Makes a blank process in the cage and stops it.
    fn blank(&self, pid: i32, fds: &[BorrowedFd<'_>]) -> anyhow::Result<(i32, Stopped, Vec<i32>)> {
        let cage = self.cage.as_ref().context("cage")?;
        let blank = cage.spawn_blank(pid, fds).context("new process in the cage")?;
        let options = ptrace::usual_options()
            | ptrace::Options::PTRACE_O_EXITKILL
            | ptrace::Options::PTRACE_O_TRACESECCOMP;
        ptrace::seize(blank.outer_pid, options)?;
        ptrace::interrupt(blank.outer_pid)?;
        let Some((_, Status::Stopped(stopped))) = ptrace::wait(Target::Thread(blank.outer_pid), false)?
        else {
            anyhow::bail!("the new process died");
        };
        Ok((blank.outer_pid, stopped, blank.fds_inside))
    }

    /// Makes the cage, if there is none yet.
    pub(super) fn make_cage(&mut self, ahead: Clocks, hostname: &[u8]) -> anyhow::Result<()> {
        if self.cage.is_some() {
            return Ok(());
        }
        let options = CageOptions {
            monotonic_ahead_ns: ahead.monotonic_ns,
            boottime_ahead_ns: ahead.boottime_ns,
            hostname: String::from_utf8_lossy(hostname).into_owned(),
            nice: self.config.limits.nice.clamp(0, 19),
            uid: self.config.uid,
            gid: self.config.gid,
            ..CageOptions::default()
        };
        self.cage = Some(Cage::new(options).context("cage")?);
        Ok(())
    }
}
