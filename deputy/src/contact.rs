//! What a supervisor says, and who answers it.
//!
//! Frames arrive on the contact's leader thread, which must not block: calls that finish at once are executed there;
//! what waits is handed to a thread of its own; what needs ptrace is handed to the tracer thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use linklayer::frame::Header;
use linklayer::quic::{Handler, Link, LinkError, ReplyTo};
use linklayer::wire::{self, Kind};
use shim::faults::{self, Point};

use crate::calls;
use crate::shared::{Command, Shared};

/// The deputy's end of the contact to one node.
pub struct Contact {
    shared: Arc<Shared>,
    node: u32,
    number: u64,
}

impl Contact {
    /// For a contact to `node`, which has this number ([`crate::shared::Contacted`]).
    pub fn new(shared: Arc<Shared>, node: u32, number: u64) -> Contact {
        Contact { shared, node, number }
    }

    fn dispatch(&self, reply: ReplyTo, payload: Vec<u8>) -> Result<(), String> {
        let kind =
            Kind::from_u16(reply.header.kind).ok_or_else(|| format!("unknown kind {}", reply.header.kind))?;
        fn body<T: bincode::Decode<()>>(payload: &[u8]) -> Result<T, String> {
            wire::decode(payload).map_err(|e| e.to_string())
        }
        let shared = &self.shared;
        match kind {
            Kind::Call => calls::begin(shared, reply, payload),
            Kind::Clone => self.post_in_turn(Command::Clone(reply.clone(), body(&payload)?), &reply),
            Kind::Exec => self.post_in_turn(Command::Exec(reply.clone(), body(&payload)?), &reply),
            Kind::ExitThread => {
                let code = body::<wire::ExitCode>(&payload)?.0;
                self.post_in_turn(Command::ExitThread(reply.clone(), code), &reply);
            }
            Kind::ExitGroup => {
                let code = body::<wire::ExitCode>(&payload)?.0;
                self.post_in_turn(Command::ExitGroup(reply.clone(), code), &reply);
            }
            Kind::Died => shared.post(Command::Died(body(&payload)?)),
            Kind::Stops => shared.post(Command::Stops(body(&payload)?)),
            Kind::Interrupt => {
                let request: wire::Interrupt = body(&payload)?;
                if let Some(worker) = shared.worker(request.tid) {
                    // The call itself may still be on its way.
                    worker.early.store(request.seq, Ordering::Release);
                }
                shared.post(Command::Interrupt(request));
            }
            Kind::Clock => reply.send(&[&wire::encode(&shim::capture::clocks())]),
            Kind::FileRead => {
                let r: wire::FileRead = body(&payload)?;
                let shared = shared.clone();
                spawn("file", move || {
                    let held = shared.held.file(r.id);
                    let file = held.or_else(|| shared.files.file(r.id));
                    reply.send(&[&crate::files::read(file.as_deref(), r.offset, r.len)])
                });
            }
            Kind::FileHashes => {
                let r: wire::FileRead = body(&payload)?;
                let shared = shared.clone();
                spawn("hashes", move || {
                    reply.send(&[&shared.files.hashes(r.id, r.offset, r.len)])
                });
            }
            Kind::MapFile => {
                let request: wire::MapFile = body(&payload)?;
                let (shared, node) = (shared.clone(), self.node);
                spawn("map", move || {
                    let answer = match shared
                        .worker(reply.header.tid)
                        .map(|w| shim::fd::get_from_thread(w.tid, request.fd))
                    {
                        Some(Ok(fd)) => {
                            let hold = |fd| crate::held::map(&shared, node, reply.header.tid, fd, &request);
                            let held = |key| shared.held.is_held(key);
                            shared.files.map(fd, &request, hold, held)
                        }
                        Some(Err(e)) => wire::MapFileReply::Errno(e.raw_os_error().unwrap_or(libc::EBADF)),
                        None => wire::MapFileReply::Errno(libc::ESRCH),
                    };
                    reply.send(&[&wire::encode(&answer)]);
                });
            }
            Kind::HeldWrite => {
                let (shared, node) = (shared.clone(), self.node);
                spawn("held", move || match wire::shared_pages(&payload) {
                    Ok((id, offset, data)) => {
                        reply.errno(crate::held::write(&shared, node, id, offset, data))
                    }
                    Err(_) => reply.errno(libc::EPROTO),
                });
            }
            Kind::GivenBack => {
                shared
                    .held
                    .given_back(self.node, body::<wire::HeldId>(&payload)?.0);
                reply.errno(0);
            }
            Kind::Homecoming => shared.post(Command::Homecoming(reply, Box::new(body(&payload)?))),
            Kind::HomeCommit => shared.post(Command::HomeCommit(reply, body(&payload)?)),
            Kind::Pages | Kind::PackedPages => {
                let piece = linklayer::pages::decode(kind, &payload).map_err(|e| e.to_string())?;
                write_pages(shared, reply.header.tid, piece.address, &piece.data)?;
            }
            Kind::SharedPages => {
                let (id, offset, data) = wire::shared_pages(&payload).map_err(|e| e.to_string())?;
                shared.objects.write((self.node, id), offset, data)?;
            }
            Kind::Coming => {
                let request: wire::Coming = body(&payload)?;
                if !shared.table.lock().contains_key(&request.pid) {
                    reply.errno(libc::ESRCH);
                    return Ok(());
                }
                let shared = shared.clone();
                spawn("coming", move || {
                    let connected = faults::at(Point::TargetReach, request.pid)
                        .and_then(|()| crate::coming::connect(&shared, &request).map_err(|e| e.to_string()));
                    match connected {
                        Ok(()) => reply.errno(0),
                        Err(e) => {
                            tracing::warn!(pid = request.pid, error = %e, "pages come on the contact");
                            shared.coming.forget(request.pid);
                            reply.errno(libc::EHOSTUNREACH);
                        }
                    }
                });
            }
            Kind::KeepBack => shared.post(Command::KeepBack(reply, body::<wire::Pid>(&payload)?.0)),
            Kind::WorksOn => shared.post(Command::WorksOn(reply, body(&payload)?)),
            Kind::Settled => shared.post(Command::Settled(body(&payload)?)),
            Kind::Moved => shared.post(Command::Moved(reply, self.node, Box::new(body(&payload)?))),
            Kind::Progress => {
                let progress: wire::Progress = body(&payload)?;
                // Only of those that there are, so that a supervisor cannot fill our memory.
                if shared.table.lock().contains_key(&progress.pid) {
                    shared.progress.lock().insert(progress.pid, progress);
                }
            }
            Kind::Action => {
                let action: wire::Action = body(&payload)?;
                // Here and now: the thread's next call must find it in effect.
                calls::set_action(shared, reply.header.tid, action);
                shared.post(Command::Action(action));
            }
            Kind::ReadProc => {
                let path = payload;
                let shared = shared.clone();
                spawn("proc", move || {
                    reply.send(&[&calls::read_proc(&shared, reply.header.tid, &path)])
                });
            }
            Kind::Synthetic => {
                let s: wire::Synthetic = body(&payload)?;
                let (later, tid) = (shared.clone(), reply.header.tid);
                calls::in_turn(shared, tid, move || {
                    spawn("synthetic", move || {
                        let ret = calls::synthetic(&later, tid, &s);
                        reply.send(&[&ret.to_le_bytes()]);
                    });
                });
            }
            Kind::MoveFailed => shared.post(Command::MoveFailed(self.node, body(&payload)?)),
            Kind::Usage => {
                shared.usage.lock().insert(self.node, body(&payload)?);
            }
            Kind::Hello => {
                let hello: wire::Hello = body(&payload)?;
                if hello.version != wire::PROTOCOL_VERSION {
                    return Err(format!(
                        "node {} speaks version {} of the job protocol, this one {}: update the older one",
                        self.node,
                        hello.version,
                        wire::PROTOCOL_VERSION
                    ));
                }
            }
            other => return Err(format!("{other:?} is not for a deputy")),
        }
        Ok(())
    }

    /// Hands the tracer a command that uses the slot of the thread that asks.
    fn post_in_turn(&self, command: Command, reply: &ReplyTo) {
        let shared = self.shared.clone();
        calls::in_turn(&self.shared, reply.header.tid, move || shared.post(command));
    }
}

/// Writes pages of a process that comes home into its vessel. Only a process that has announced itself
/// ([`Kind::Homecoming`]) and only addresses of user space outside the deputy's own areas are accepted.
pub fn write_pages(shared: &Shared, pid: i32, address: u64, data: &[u8]) -> Result<(), String> {
    let Some(tid) = shared.homecoming.lock().get(&pid).copied() else {
        return Err(format!("pages for process {pid}, which is not on its way home"));
    };
    let end = address
        .checked_add(data.len() as u64)
        .ok_or("pages beyond the address space")?;
    let reserved = linklayer::image::RESERVED;
    if end > linklayer::image::USER_END || (address < reserved.end && end > reserved.start) {
        return Err(format!("pages at {address:#x}, which no guest has"));
    }
    shim::memory::ProcessMemory::new(tid)
        .write_forced(address, data)
        .map_err(|e| format!("pages of process {pid} at {address:#x}: {e}"))
}

/// Runs something that may wait on a thread of its own.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(e) = std::thread::Builder::new()
        .name(name.into())
        .stack_size(256 << 10)
        .spawn(work)
    {
        tracing::error!(error = %e, "no thread for {name}");
    }
}

impl Handler for Contact {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        let reply = ReplyTo {
            link: link.clone(),
            lane,
            header,
        };
        if let Err(why) = self.dispatch(reply, payload) {
            tracing::error!(node = self.node, %why, "supervisor breaks the protocol");
            link.close();
            self.shared.post(Command::Lost(self.node, self.number, why));
        }
    }

    fn lost(&self, why: &LinkError) {
        self.shared
            .post(Command::Lost(self.node, self.number, why.to_string()));
    }
}
