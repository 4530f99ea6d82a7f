//! A process comes home: its vessel takes its layout, its pages and its threads' state, and is the process again.

use anyhow::Context;
use linklayer::wire;

use crate::home::Home;
use crate::process::{Mode, Role, Task};
use crate::shared::ReplyTo;

impl Home {
    /// Its image is there: the vessel's layout is made equal to it. The guest is stopped and stays the live copy until
    /// the commit.
    pub(crate) fn homecoming(&mut self, reply: ReplyTo, body: wire::Homecoming) -> anyhow::Result<()> {
        let pid = body.image.pid;
        let result = self.prepare_home(&body);
        match result {
            Ok(()) => {
                self.shared.homecoming.lock().insert(pid);
                if let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) {
                    away.coming = Some(Box::new(body));
                }
                reply.errno(0);
                Ok(())
            }
            Err(e) => {
                reply.errno(libc::EIO);
                Err(e.context(format!("process {pid} cannot come home")))
            }
        }
    }

    fn prepare_home(&mut self, body: &wire::Homecoming) -> anyhow::Result<()> {
        body.image.validate()?;
        let pid = body.image.pid;
        for thread in &body.image.threads {
            let worker = self
                .shared
                .worker(thread.tid)
                .context("a thread without a vessel thread")?;
            anyhow::ensure!(
                worker.pid == pid,
                "thread {} belongs to another process",
                thread.tid
            );
            anyhow::ensure!(
                worker.current.lock().is_none(),
                "thread {} is in a call",
                thread.tid
            );
        }
        let files = &self.shared.files;
        let process = self.processes.get_mut(&pid).context("no such process")?;
        let away = process.away().context("it is at home")?;
        let leader = body
            .image
            .threads
            .first()
            .context("a process without threads")?
            .tid;
        let worker = self
            .shared
            .workers
            .read()
            .get(&leader)
            .cloned()
            .context("leader")?;
        away.vessel
            .adapt_layout(&body.image, &worker.slot, &|id| files.file(id))?;
        Ok(())
    }

    /// All its pages are there: it runs at home from now on.
    pub(crate) fn home_commit(&mut self, reply: ReplyTo, pid: i32) -> anyhow::Result<()> {
        self.shared.homecoming.lock().remove(&pid);
        match self.resume_home(pid) {
            Ok(()) => {
                reply.errno(0);
                self.publish(pid);
                Ok(())
            }
            Err(e) => {
                reply.errno(libc::EIO);
                Err(e.context(format!("process {pid} cannot be resumed at home")))
            }
        }
    }

    fn resume_home(&mut self, pid: i32) -> anyhow::Result<()> {
        let process = self.processes.get_mut(&pid).context("no such process")?;
        let Mode::Away(away) = std::mem::replace(&mut process.mode, Mode::Native) else {
            anyhow::bail!("it is at home");
        };
        let coming = away.coming.context("it was not announced")?;
        let tids: Vec<i32> = self
            .tasks
            .values()
            .filter(|t| t.pid == pid)
            .map(|t| t.tid)
            .collect();
        for tid in &tids {
            if let Some(worker) = self.shared.workers.write().remove(tid) {
                worker.slot.abandon();
            }
        }
        let mut running = away.vessel.resume(&coming.image)?;
        crate::vessel::set_options(&mut running, Home::options());
        for tid in tids {
            let task = self.tasks.remove(&tid);
            // The catcher has ended; the process does not wait for the report of that.
            if task.is_some_and(|t| t.role == Role::Worker) {
                self.tasks.insert(tid, Task::new(tid, pid, Role::Native));
            }
        }
        for stopped in running {
            stopped.cont(0)?;
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            match &coming.reason {
                linklayer::stay::StayReason::Asked => tracing::info!(pid, "came home: somebody asked"),
                reason => tracing::warn!(pid, %reason, "came home"),
            }
            process.stay = Some(coming.reason);
            process.how = "came home";
            for waiter in process.waiters.drain(..) {
                let _ = waiter.send(Ok(()));
            }
            if let Some((node, done)) = process.next.take() {
                self.shared
                    .post(crate::shared::Command::Out(pid, node, done, None));
            }
        }
        Ok(())
    }
}
