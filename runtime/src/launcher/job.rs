//! The deputy's process: finds the node, opens the contact, attaches, serves.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use crossbeam_channel::RecvTimeoutError;
use deputy::{Cluster, Deputy, Shared};
use linklayer::cpu;
use linklayer::frame::Header;
use linklayer::quic::{Fingerprint, Handler, Link, OneTimeKey, Options};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use parking_lot::Mutex;

use crate::cli::mosrun::{Args, Cpu, Topology};
use crate::cluster::state::{NodeState, NodeStatus};
use crate::control::{Client, SupervisorRequest};
use crate::job_id::JobId;
use crate::jobs::{Arrival, Counters, JobControl, JobInfo, JobServer, ProcInfo};
use crate::placement::{self, Place, Want};
use crate::rundir;

/// How long what is known of the nodes serves for placing programs at exec.
const NODES_FRESH: Duration = Duration::from_millis(500);

/// Where the deputy says what it does.
pub(super) enum Log {
    /// Nowhere.
    None,
    /// The program's standard error (with -v).
    Stderr(File, tracing::Level),
    /// A file.
    File(File, tracing::Level),
}

impl Log {
    /// As the options say.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn open(args: &Args) -> anyhow::Result<Log> {
        let level = match args.verbose {
            0 => tracing::Level::INFO,
            1 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        };
        if let Some(path) = &args.log {
            let file = File::options()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("cannot write the log {}", path.display()))?;
            return Ok(Log::File(file, level));
        }
        if args.verbose == 0 && !args.warn {
            return Ok(Log::None);
        }
        let level = if args.verbose == 0 {
            tracing::Level::WARN
        } else {
            level
        };
        let stderr = nix::unistd::dup(std::io::stderr()).context("standard error")?;
        Ok(Log::Stderr(stderr.into(), level))
    }

    /// The descriptor to keep.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        match self {
            Log::None => None,
            Log::Stderr(f, _) | Log::File(f, _) => Some(f.as_raw_fd()),
        }
    }

    fn start(self) {
        let (file, level) = match self {
            Log::None => return,
            Log::Stderr(f, l) | Log::File(f, l) => (f, l),
        };
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(format!("{level},quinn_proto=error,quinn_udp=error,rustls=error"))
            .with_target(false)
            .with_ansi(false)
            .with_writer(std::sync::Mutex::new(file))
            .finish();
        let _ = tracing::subscriber::set_global_default(subscriber);
    }
}

/// The deputy's main function; its process ends when it returns.
pub(super) fn deputy(args: &Args, program: i32, mut socket: UnixStream, log: Log, keep: &[RawFd]) {
    let verdict = shim::process::close_all_but(keep)
        .context("descriptors")
        .and_then(|()| {
            std::env::set_current_dir("/")?;
            shim::process::raise_nofile();
            shim::faults::look_in(rundir::path());
            log.start();
            socket.write_all(&std::process::id().to_le_bytes())?;
            socket.read_exact(&mut [0])?;
            attach(args, program)
        });
    match verdict {
        Ok(Attached::No(notice)) => {
            let _ = socket.write_all(format!("N{}", notice.unwrap_or_default()).as_bytes());
        }
        Ok(Attached::Yes(ready)) => {
            if socket.write_all(b"T").is_err() {
                return;
            }
            drop(socket);
            ready.listen().serve();
        }
        Err(e) => {
            let _ = socket.write_all(format!("E{e:#}").as_bytes());
        }
    }
}

/// Whether the program gets a deputy.
enum Attached {
    /// It has one.
    Yes(Box<Ready>),
    /// It runs here without one; what the user asked to be told about that.
    No(Option<String>),
}

/// A deputy that has attached.
pub(super) struct Ready {
    deputy: Deputy,
    control: Arc<Control>,
}

/// A deputy that can be found.
pub(super) struct Listening {
    deputy: Deputy,
    server: Option<JobServer>,
}

impl Ready {
    /// Lets the job be listed and steered.
    pub(super) fn listen(self) -> Listening {
        let path = rundir::job_socket(&rundir::path(), std::process::id());
        let server = JobServer::start(&path, self.control)
            .inspect_err(|e| tracing::warn!(error = %e, "the job cannot be listed"))
            .ok();
        Listening {
            deputy: self.deputy,
            server,
        }
    }
}

impl Listening {
    /// Serves the job to its end.
    pub(super) fn serve(self) {
        if let Err(e) = self.deputy.serve() {
            tracing::error!(error = format!("{e:#}"), "the deputy fails; its processes end");
        }
        drop(self.server);
        tracing::info!("the job has ended");
    }
}

/// Decides where the program starts, and attaches to it unless it is to run here without a deputy.
///
/// A program that starts here has a deputy all the same when a daemon runs, so that it is listed and can be moved later.
fn attach(args: &Args, program: i32) -> anyhow::Result<Attached> {
    let want = args.want();
    let may_stay = args.fallback || matches!(want, Want::Best);
    let mut client = match Client::connect() {
        Ok(c) => c,
        Err(_) if want == Want::Home => return Ok(Attached::No(None)),
        Err(e) if may_stay => return Ok(stays_here(args, &e)),
        Err(e) => return Err(e.into()),
    };
    let nodes = client.nodes()?;
    let places = match placement::place(&want, &nodes, rand::random()) {
        Ok(p) => p,
        Err(e) if may_stay => return Ok(stays_here(args, &e)),
        Err(e) => return Err(e.into()),
    };
    let others = nodes.iter().any(|n| !n.is_self && n.status == NodeStatus::Alive);
    let first = places.first().copied().unwrap_or(Place::Home);
    if first == Place::Home && !others && matches!(want, Want::Best) {
        return Ok(Attached::No(None));
    }
    let home = nodes.iter().find(|n| n.is_self).map_or(0, |n| n.number);
    let job = JobId::new(home, std::process::id());
    let placer = Arc::new(Placer {
        want: want.clone(),
        job,
        home,
        key: OneTimeKey::generate()?,
        refuse_homeward: args.error,
        topology_of_home: args.topology == Topology::Home,
        locked: args.lock,
        cpu: args.cpu,
        state: Mutex::new(Known {
            nodes,
            at: Instant::now(),
            first: None,
            begun: false,
        }),
    });
    let mut deputy = Deputy::new(placer.clone())?;
    let shared = deputy.shared();
    for place in &places {
        let Place::Node(node) = *place else { break };
        match shared.contact(node) {
            Ok(_) => {
                placer.state.lock().first = Some(node);
                break;
            }
            Err(why) if matches!(want, Want::Best | Want::Drawn(_)) => {
                tracing::warn!(node, why, "node passed over");
            }
            Err(why) if args.fallback => return Ok(stays_here(args, &why)),
            Err(why) => anyhow::bail!("node {node}: {why}"),
        }
    }
    if matches!(want, Want::Drawn(_)) && placer.state.lock().first.is_none() {
        anyhow::bail!("none of the drawn nodes takes the program");
    }
    deputy.seize(program, matches!(want, Want::Home))?;
    let control = Arc::new(Control::new(shared, job, home, program, want));
    Ok(Attached::Yes(Box::new(Ready { deputy, control })))
}

/// Takes up a process that runs already. What it executes stays at home until somebody moves it.
///
/// # Errors
/// When it may not be traced; it is as it was.
pub(super) fn adopt(pid: i32) -> anyhow::Result<(Ready, Vec<deputy::LeftOut>)> {
    // Without a daemon there is nowhere to go, which may change.
    let nodes = Client::connect().and_then(|mut c| c.nodes()).unwrap_or_default();
    let home = nodes.iter().find(|n| n.is_self).map_or(0, |n| n.number);
    let job = JobId::new(home, std::process::id());
    let placer = Placer {
        want: Want::Home,
        job,
        home,
        key: OneTimeKey::generate()?,
        refuse_homeward: false,
        topology_of_home: false,
        locked: false,
        cpu: Cpu::Home,
        state: Mutex::new(Known {
            nodes,
            at: Instant::now(),
            first: None,
            begun: false,
        }),
    };
    let mut deputy = Deputy::new(Arc::new(placer))?;
    let left_out = deputy.adopt(pid)?;
    let control = Arc::new(Control::new(deputy.shared(), job, home, pid, Want::Home));
    Ok((Ready { deputy, control }, left_out))
}

/// The program runs here although it was meant to run elsewhere. -F promises a notice.
fn stays_here(args: &Args, why: &dyn std::fmt::Display) -> Attached {
    let notice = format!("{why}; the program runs here");
    if args.verbose > 0 || args.log.is_some() {
        tracing::warn!("{notice}");
    }
    let said = args.verbose > 0 && args.log.is_none();
    Attached::No((args.fallback && !said).then_some(notice))
}

/// What programs that are started here may execute.
fn instructions(which: Cpu) -> Vec<String> {
    match which {
        Cpu::Home => cpu::here(),
        Cpu::Baseline => cpu::baseline(&cpu::here()),
    }
}

struct Known {
    nodes: Vec<NodeState>,
    at: Instant,
    /// The node that answered before the program began: its first image goes there.
    first: Option<u32>,
    /// It was said where the first program of the job begins.
    begun: bool,
}

/// The cluster as the deputy uses it.
struct Placer {
    want: Want,
    job: JobId,
    home: u32,
    key: OneTimeKey,
    /// -e.
    refuse_homeward: bool,
    /// --topology=home.
    topology_of_home: bool,
    /// -L.
    locked: bool,
    /// What its programs may execute.
    cpu: Cpu,
    state: Mutex<Known>,
}

impl Cluster for Placer {
    fn choose(&self, from: u32) -> Option<u32> {
        let mut known = self.state.lock();
        if self.locked && std::mem::replace(&mut known.begun, true) {
            return (from != 0).then_some(from);
        }
        if let Some(first) = known.first.take() {
            if matches!(self.want, Want::Node(_)) {
                known.first = Some(first);
            }
            return Some(first);
        }
        if known.at.elapsed() > NODES_FRESH {
            match Client::connect().and_then(|mut c| c.nodes()) {
                Ok(nodes) => known.nodes = nodes,
                Err(e) => tracing::debug!(error = %e, "nodes not known anew"),
            }
            known.at = Instant::now();
        }
        let places = placement::place(&self.want, &known.nodes, rand::random()).ok()?;
        match places.first() {
            Some(Place::Node(node)) => {
                // Until the load vectors show it, the next program must know that this one is there.
                if let Some(state) = known.nodes.iter_mut().find(|n| n.number == *node) {
                    state.pending += 1;
                }
                Some(*node)
            }
            _ => None,
        }
    }

    fn contact(&self, node: u32, handler: Arc<dyn Handler>) -> Result<Link, String> {
        let open = || -> anyhow::Result<Link> {
            let fingerprint = self.key.fingerprint().0;
            let request = SupervisorRequest {
                node,
                job: self.job,
                peer_fingerprint: fingerprint,
            };
            let placement = Client::connect()?.request_supervisor(request)?;
            let peer = Fingerprint(placement.fingerprint);
            let link = Link::connect(placement.addr, &self.key, peer, handler, Options::default())?;
            let hello = wire::encode(&wire::Hello {
                version: wire::PROTOCOL_VERSION,
                node: self.home,
                refuse_homeward: self.refuse_homeward,
                topology_of_home: self.topology_of_home,
                instructions: instructions(self.cpu),
            });
            link.send(0, Header::new(Kind::Hello as u16, 0, link.next_seq()), &[&hello])?;
            Ok(link)
        };
        open().map_err(|e| format!("{e:#}"))
    }
}

/// How long a move may take until nobody waits for it any more, and how often it is told how far it is.
const MOVE_TIMEOUT: Duration = Duration::from_secs(580);
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);

/// The job as `mosps` and `mosmigrate` see it.
struct Control {
    shared: Arc<Shared>,
    job: JobId,
    home: u32,
    main: u32,
    want: Want,
    started_unix_ms: u64,
    /// Calls of each process at the last look, for the rate.
    rates: Mutex<std::collections::HashMap<i32, (Instant, u64)>>,
}

impl JobControl for Control {
    fn list(&self) -> JobInfo {
        let usage = self.shared.usage.lock().clone();
        let table = self.shared.table.lock().clone();
        let mut rates = self.rates.lock();
        rates.retain(|pid, _| table.contains_key(pid));
        let mut totals = Counters::default();
        for u in usage.values() {
            totals.cache_hits += u.cache_hits;
            totals.cache_misses += u.cache_misses;
            totals.cache_invalidations += u.cache_invalidations;
        }
        let mut processes: Vec<ProcInfo> = table
            .values()
            .map(|view| {
                let stat = Stat::read(view.pid);
                let there = usage
                    .values()
                    .flat_map(|u| &u.guests)
                    .find(|g| g.pid == view.pid && view.node != 0);
                let now = Instant::now();
                let (then, before) = rates
                    .insert(view.pid, (now, view.forwarded))
                    .unwrap_or((now, view.forwarded));
                let seconds = now.duration_since(then).as_secs_f64();
                totals.calls_forwarded += view.forwarded;
                ProcInfo {
                    pid: view.pid as u32,
                    ppid: stat.ppid,
                    comm: stat.comm,
                    node: view.node,
                    home: self.home,
                    arrival: self.arrival(view),
                    // A vessel has one that its program does not have.
                    threads: stat.threads.saturating_sub(u32::from(view.node != 0)),
                    rss_bytes: there.map_or(stat.rss_bytes, |g| g.rss_bytes),
                    cpu_ms: stat.cpu_ms + there.map_or(0, |g| g.utime_ms + g.stime_ms),
                    counters: Counters {
                        calls_forwarded: view.forwarded,
                        moves_out: view.moves_out,
                        moves_home: view.moves_home,
                        ..Counters::default()
                    },
                    calls_per_s: if seconds > 0.01 {
                        (view.forwarded - before) as f64 / seconds
                    } else {
                        0.0
                    },
                    stay: view
                        .stay
                        .as_ref()
                        .filter(|_| view.node == 0)
                        .map(ToString::to_string),
                }
            })
            .collect();
        processes.sort_by_key(|p| p.pid);
        JobInfo {
            id: self.job,
            front_pid: self.main,
            deputy_pid: std::process::id(),
            main_pid: self.main,
            uid: nix::unistd::geteuid().as_raw(),
            started_unix_ms: self.started_unix_ms,
            processes,
            totals,
        }
    }

    fn migrate(
        &self,
        pid: u32,
        to: u32,
        mode: wire::Mode,
        tell: &mut dyn FnMut(wire::Progress),
    ) -> Result<wire::MoveReport, String> {
        let number = pid as i32;
        let (done, wait) = crossbeam_channel::bounded(1);
        self.shared.post(if to == crate::jobs::HOME || to == self.home {
            deputy::Command::Bring(number, StayReason::Asked, mode, done)
        } else {
            deputy::Command::Out(number, Box::new(deputy::Wish::new(to, mode, done)))
        });
        let until = Instant::now() + MOVE_TIMEOUT;
        let mut told = None;
        while Instant::now() < until {
            match wait.recv_timeout(PROGRESS_PERIOD) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Timeout) => {
                    let progress = self.shared.progress.lock().get(&number).cloned();
                    if let Some(progress) = progress.filter(|p| told.as_ref() != Some(p)) {
                        tell(progress.clone());
                        told = Some(progress);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err("the deputy ends".into()),
            }
        }
        let seconds = MOVE_TIMEOUT.as_secs();
        Err(format!(
            "process {pid} did not arrive in {seconds} s; it may still do so"
        ))
    }

    fn freeze(&self, pid: u32, stop: bool) -> Result<(), String> {
        let (done, wait) = crossbeam_channel::bounded(1);
        self.shared.post(deputy::Command::Freeze(pid as i32, stop, done));
        wait.recv_timeout(Duration::from_secs(30))
            .map_err(|_| format!("process {pid} did not stop within 30 s"))?
    }

    fn release(&self) -> Result<(), String> {
        let (done, wait) = crossbeam_channel::bounded(1);
        self.shared.post(deputy::Command::Release(done));
        wait.recv_timeout(Duration::from_secs(30))
            .map_err(|_| "not all threads could be let go within 30 s".to_string())?
    }
}

impl Control {
    fn new(shared: Arc<Shared>, job: JobId, home: u32, main: i32, want: Want) -> Control {
        Control {
            shared,
            job,
            home,
            main: main as u32,
            want,
            started_unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_millis() as u64),
            rates: Mutex::default(),
        }
    }

    fn arrival(&self, view: &deputy::ProcessView) -> Arrival {
        match (&view.stay, view.node) {
            (Some(StayReason::Asked), 0) => Arrival::Asked,
            (Some(reason @ StayReason::Call { .. }), 0) => Arrival::WentHome(reason.to_string()),
            (_, 0) if view.how == "adopted" => Arrival::Adopted,
            (_, 0) => Arrival::Home,
            _ if view.how == "forked there" => Arrival::Inherited,
            _ if view.how == "asked" => Arrival::Asked,
            _ => match self.want {
                Want::Node(_) => Arrival::Named,
                Want::Drawn(_) => Arrival::Drawn,
                _ => Arrival::Placed,
            },
        }
    }
}

/// What /proc/PID/stat says of a process at home.
#[derive(Default)]
struct Stat {
    comm: String,
    ppid: u32,
    threads: u32,
    rss_bytes: u64,
    cpu_ms: u64,
}

impl Stat {
    fn read(pid: i32) -> Stat {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let (Some(open), Some(close)) = (text.find('('), text.rfind(')')) else {
            return Stat::default();
        };
        let fields: Vec<&str> = text[close + 1..].split_whitespace().collect();
        // The first of them is field number 3 of proc_pid_stat(5).
        let field = |n: usize| fields.get(n - 3).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
        Stat {
            comm: text[open + 1..close].to_string(),
            ppid: field(4) as u32,
            threads: field(20) as u32,
            rss_bytes: field(24) * 4096,
            // Clock ticks are 10 ms on every Linux.
            cpu_ms: (field(14) + field(15)) * 10,
        }
    }
}
