//! What home says to the supervisor.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use linklayer::cpu;
use linklayer::frame::Header;
use linklayer::image::Clocks;
use linklayer::pages::Kept;
use linklayer::quic::{Handler, Link, LinkError, ReplyTo};
use linklayer::wire::{self, Kind};

use super::arrivals::Frames;
use super::files::Stored;
use super::shared::{Command, Shared};

/// Everything needed to build a guest.
pub struct Build {
    /// The process.
    pub launch: wire::Launch,
    /// Its pages that are not as in a file.
    pub pages: Kept,
    /// The link that began to build it, if one did.
    pub begun_by: Option<u64>,
    /// They are to be put into the page store.
    pub keep_pages: bool,
    /// So are those of these frames, whose pages were put into the process.
    pub landed: Frames,
    /// The files it maps, by number.
    pub files: HashMap<u64, Arc<Stored>>,
    /// How far home's clocks are ahead of this node's.
    pub ahead: Clocks,
    /// When everything had come.
    pub begun: Instant,
    /// The pages that come when it runs.
    pub later: Option<super::postcopy::Later>,
    /// Set when home has said that it does not come, or nobody hears of it any more.
    pub needless: Arc<AtomicBool>,
    /// Where to say how it went.
    pub answer: ReplyTo,
}

/// The supervisor's end of the contact.
pub struct Contact {
    shared: Arc<Shared>,
}

impl Contact {
    /// For this supervisor.
    pub fn new(shared: Arc<Shared>) -> Contact {
        Contact { shared }
    }

    fn dispatch(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) -> Result<(), String> {
        fn body<T: bincode::Decode<()>>(payload: &[u8]) -> Result<T, String> {
            wire::decode(payload).map_err(|e| e.to_string())
        }
        let kind = Kind::from_u16(header.kind).ok_or_else(|| format!("unknown kind {}", header.kind))?;
        let shared = &self.shared;
        let answer = ReplyTo {
            link: link.clone(),
            lane,
            header,
        };
        match kind {
            Kind::Launch | Kind::Pages | Kind::PackedPages | Kind::Present | Kind::LaunchBuild => {
                shared.arrivals.frame(shared, answer, kind, &payload)?;
            }
            Kind::Listen => {
                let request: wire::Listen = body(&payload)?;
                let shared = shared.clone();
                // The page store may not be open yet.
                self.shared.starter.start("listen", move || {
                    let listening = shared.arrivals.listen(&shared, request);
                    answer.send(&[&wire::encode(&listening)]);
                });
            }
            Kind::Share => {
                let share: wire::Share = body(&payload)?;
                let errno = share_objects(shared, &share);
                answer.errno(errno);
            }
            Kind::SharedPages => {
                let (id, offset, data) = wire::shared_pages(&payload).map_err(|e| e.to_string())?;
                shared.objects.write(id, offset, data)?;
            }
            Kind::GiveBack => {
                let id = body::<wire::HeldId>(&payload)?.0;
                let shared = shared.clone();
                self.shared
                    .starter
                    .start("held", move || answer.errno(super::held::wanted(&shared, id)));
            }
            Kind::MoveTo => super::departure::begin(shared, body(&payload)?),
            Kind::LaunchGo => shared.post(Command::LaunchGo(body::<wire::Pid>(&payload)?.0)),
            Kind::Signal => {
                let signal: wire::Signal = body(&payload)?;
                let counted = shared.arrived(signal.pid);
                shared.post(Command::Signal(signal, counted));
            }
            Kind::WouldStop => {
                let would = wire::WouldStop(shared.would_stop(&body(&payload)?));
                answer.send(&[&wire::encode(&would)]);
            }
            Kind::Freeze => {
                let pid = body::<wire::Pid>(&payload)?.0;
                shared.post(Command::Freeze(pid, shared.arrived(pid)));
            }
            Kind::Thaw => shared.post(Command::Thaw(body::<wire::Pid>(&payload)?.0)),
            Kind::Discard => {
                let pid = body::<wire::Pid>(&payload)?.0;
                shared.arrivals.forget(pid);
                shared.objects.forget(pid);
                shared.post(Command::Discard(pid));
            }
            Kind::Bring => {
                let bring: wire::Bring = body(&payload)?;
                super::departure::begin_home(shared, bring);
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
                let lacks = cpu::missing(&hello.instructions, &cpu::here()).join(", ");
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
}

/// Makes the memory that a process will share.
fn share_objects(shared: &Shared, share: &wire::Share) -> i32 {
    for (object, reserved) in &share.objects {
        if let Err(e) = shared
            .objects
            .announce(object.id, share.pid, object.size, *reserved)
        {
            tracing::error!(pid = share.pid, error = %e, "shared memory");
            shared.objects.forget(share.pid);
            return e.raw_os_error().unwrap_or(libc::EPROTO);
        }
    }
    0
}

impl Handler for Contact {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        // The first frames may come before the accepting thread has the link.
        self.shared.set_link(link.clone());
        if let Err(why) = self.dispatch(link, lane, header, payload) {
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
