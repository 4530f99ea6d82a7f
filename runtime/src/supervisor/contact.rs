//! What home says to the supervisor.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use linklayer::cpu;
use linklayer::frame::Header;
use linklayer::image::Clocks;
use linklayer::quic::{Handler, Link, LinkError};
use linklayer::wire::{self, Kind};
use parking_lot::Mutex;

use super::files::Stored;
use super::shared::{Answer, Command, Shared};

/// Most bytes of pages that may wait for one process that is being built.
const MAX_PAGES_BYTES: usize = 8 << 30;

/// Everything needed to build a guest.
pub struct Build {
    /// The process.
    pub launch: wire::Launch,
    /// Its pages that are not as in a file.
    pub pages: Vec<(u64, Vec<u8>)>,
    /// The files it maps, by number.
    pub files: HashMap<u64, Arc<Stored>>,
    /// How far home's clocks are ahead of this node's.
    pub ahead: Clocks,
    /// Where to say how it went.
    pub answer: Answer,
}

struct Incoming {
    launch: wire::Launch,
    pages: Vec<(u64, Vec<u8>)>,
    bytes: usize,
}

/// The supervisor's end of the contact.
pub struct Contact {
    shared: Arc<Shared>,
    incoming: Mutex<HashMap<i32, Incoming>>,
}

impl Contact {
    /// For this supervisor.
    pub fn new(shared: Arc<Shared>) -> Contact {
        Contact {
            shared,
            incoming: Mutex::default(),
        }
    }

    fn dispatch(&self, lane: u32, header: Header, payload: Vec<u8>) -> Result<(), String> {
        fn body<T: bincode::Decode<()>>(payload: &[u8]) -> Result<T, String> {
            wire::decode(payload).map_err(|e| e.to_string())
        }
        let kind = Kind::from_u16(header.kind).ok_or_else(|| format!("unknown kind {}", header.kind))?;
        let shared = &self.shared;
        match kind {
            Kind::Launch => {
                let launch: wire::Launch = body(&payload)?;
                launch.image.validate().map_err(|e| e.to_string())?;
                let pid = launch.image.pid;
                self.incoming.lock().insert(
                    pid,
                    Incoming {
                        launch,
                        pages: Vec::new(),
                        bytes: 0,
                    },
                );
            }
            Kind::Pages => {
                let Some((address, data)) = payload.split_first_chunk::<8>() else {
                    return Err("pages without an address".into());
                };
                let mut incoming = self.incoming.lock();
                let Some(entry) = incoming.get_mut(&header.tid) else {
                    return Err(format!(
                        "pages for process {}, which was not announced",
                        header.tid
                    ));
                };
                entry.bytes += data.len();
                if entry.bytes > MAX_PAGES_BYTES {
                    return Err("more pages than a process may bring".into());
                }
                entry.pages.push((u64::from_le_bytes(*address), data.to_vec()));
            }
            Kind::Share => {
                let share: wire::Share = body(&payload)?;
                let errno = share_objects(shared, &share);
                shared.answer(&Answer { lane, header }, &wire::encode(&errno));
            }
            Kind::SharedPages => {
                let (id, offset, data) = wire::shared_pages(&payload).map_err(|e| e.to_string())?;
                shared.objects.write(id, offset, data)?;
            }
            Kind::LaunchBuild => {
                let wire::Pid(pid) = body(&payload)?;
                let Some(incoming) = self.incoming.lock().remove(&pid) else {
                    return Err(format!("process {pid} was not announced"));
                };
                self.prepare(incoming, Answer { lane, header });
            }
            Kind::LaunchGo => shared.post(Command::LaunchGo(body::<wire::Pid>(&payload)?.0)),
            Kind::Signal => {
                let signal: wire::Signal = body(&payload)?;
                let counted = shared.arrived(signal.pid);
                shared.post(Command::Signal(signal, counted));
            }
            Kind::Freeze => {
                let pid = body::<wire::Pid>(&payload)?.0;
                shared.post(Command::Freeze(pid, shared.arrived(pid)));
            }
            Kind::Thaw => shared.post(Command::Thaw(body::<wire::Pid>(&payload)?.0)),
            Kind::Discard => {
                let pid = body::<wire::Pid>(&payload)?.0;
                self.incoming.lock().remove(&pid);
                shared.objects.forget(pid);
                shared.post(Command::Discard(pid));
            }
            Kind::Bring => {
                let bring: wire::Bring = body(&payload)?;
                shared.post(Command::GoHome(bring.pid, bring.reason));
            }
            Kind::Hello => {
                let hello: wire::Hello = body(&payload)?;
                if hello.version != wire::PROTOCOL_VERSION {
                    return Err(format!(
                        "home speaks version {} of the job protocol, this node {}: update the older one",
                        hello.version,
                        wire::PROTOCOL_VERSION
                    ));
                }
                shared
                    .topology_of_home
                    .store(hello.topology_of_home, Ordering::Release);
                if hello.instructions.len() > cpu::MAX_FLAGS {
                    return Err("more instruction sets than there are".into());
                }
                let here = cpu::instructions(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
                let lacks = cpu::missing(&hello.instructions, &here).join(", ");
                let _ = shared.lacks.set(lacks);
                shared
                    .refuse_homeward
                    .store(hello.refuse_homeward, Ordering::Release);
            }
            Kind::End => shared.post(Command::End("the job has ended".into())),
            other => return Err(format!("{other:?} is not for a supervisor")),
        }
        Ok(())
    }

    /// Fetches what is missing of the files, off the contact's thread, and hands the whole to the tracer.
    fn prepare(&self, incoming: Incoming, answer: Answer) {
        let shared = self.shared.clone();
        let refused = answer.clone();
        let spawned = std::thread::Builder::new().name("build".into()).spawn(move || {
            let mut files = HashMap::new();
            for file in &incoming.launch.files {
                match shared
                    .files
                    .get(file, |offset, len| shared.read_file(file.id, offset, len))
                {
                    Ok(stored) => files.insert(file.id, stored),
                    Err(e) => {
                        let refused = format!("{}: {e}", String::from_utf8_lossy(&file.path));
                        return shared.answer(&answer, &wire::encode(&wire::LaunchReady { refused }));
                    }
                };
            }
            let ahead = match shared.clocks_ahead() {
                Ok(ahead) => ahead,
                Err(e) => {
                    let refused = format!("home's clocks: {e}");
                    return shared.answer(&answer, &wire::encode(&wire::LaunchReady { refused }));
                }
            };
            let (launch, pages) = (incoming.launch, incoming.pages);
            shared.post(Command::Build(Box::new(Build {
                launch,
                pages,
                files,
                ahead,
                answer,
            })));
        });
        if let Err(e) = spawned {
            let body = wire::LaunchReady {
                refused: e.to_string(),
            };
            self.shared.answer(&refused, &wire::encode(&body));
        }
    }
}

/// Makes the memory that a process will share.
fn share_objects(shared: &Shared, share: &wire::Share) -> wire::Errno {
    for (object, reserved) in &share.objects {
        if let Err(e) = shared
            .objects
            .announce(object.id, share.pid, object.size, *reserved)
        {
            tracing::error!(pid = share.pid, error = %e, "shared memory");
            shared.objects.forget(share.pid);
            return wire::Errno(e.raw_os_error().unwrap_or(libc::EPROTO));
        }
    }
    wire::Errno(0)
}

impl Handler for Contact {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        // The first frames may come before the accepting thread has the link.
        self.shared.set_link(link.clone());
        if let Err(why) = self.dispatch(lane, header, payload) {
            tracing::error!(%why, "home breaks the protocol");
            link.close();
            self.shared.post(Command::End(why));
        }
    }

    fn lost(&self, why: &LinkError) {
        self.shared
            .post(Command::End(format!("contact to home lost: {why}")));
    }
}
