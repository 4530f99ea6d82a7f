//! dev driver
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::process::{Command, Stdio};
use linklayer::quic::*;
struct C { key: OneTimeKey }
impl deputy::Cluster for C {
    fn choose(&self) -> Option<u32> { Some(2) }
    fn contact(&self, _n: u32, h: Arc<dyn Handler>) -> Result<Link, String> {
        let mut c = Command::new("/proc/self/exe"); c.arg("supervise").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = c.spawn().map_err(|e| e.to_string())?;
        let cfg = runtime::supervisor::SupervisorConfig { job: runtime::job_id::JobId::new(1, 2), node: 2, node_name: "b".into(), home_node: 1, home_name: "a".into(), uid: 0, gid: 0, groups: vec![], peer_fingerprint: self.key.fingerprint().0, listen: "127.0.0.1".parse().unwrap(), limits: Default::default() };
        cfg.write_to(child.stdin.as_mut().unwrap()).map_err(|e| e.to_string())?;
        let a = runtime::supervisor::SupervisorAnswer::read_from(child.stdout.as_mut().unwrap()).map_err(|e| e.to_string())?;
        let runtime::supervisor::SupervisorAnswer::Ready(r) = a else { return Err(format!("{a:?}")) };
        Link::connect(r.addr, &self.key, Fingerprint(r.fingerprint), h, Options::default()).map_err(|e| e.to_string())
    }
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let level = match std::env::var("V").as_deref() { Ok("2") => tracing::Level::TRACE, Ok("1") => tracing::Level::DEBUG, Ok("0") => tracing::Level::ERROR, _ => tracing::Level::INFO };
    if std::env::var("V").is_ok() { let f = std::fs::File::options().append(true).create(true).open("/tmp/away.log").unwrap();
    tracing_subscriber::fmt().with_max_level(level).with_ansi(false).with_writer(std::sync::Mutex::new(f)).init(); }
    if args[1] == "supervise" {
        let cfg = runtime::supervisor::SupervisorConfig::read_from(&mut std::io::stdin()).unwrap();
        if let Err(e) = runtime::supervisor::run(cfg) { eprintln!("sup: {e:#}"); }
        return;
    }
    let (mut a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
    use std::io::{Read, Write};
    let me = std::process::id() as i32;
    let log = std::env::var("V").is_ok();
    let _ = log;
    shim::process::spawn_detached(move || {
        let mut d = deputy::Deputy::new(Arc::new(C { key: OneTimeKey::generate().unwrap() })).unwrap();
        d.shared().contact(2).unwrap();
        d.seize(me).unwrap();
        b.write_all(b"x").unwrap();
        drop(b);
        if let Err(e) = d.serve() { eprintln!("deputy: {e:#}"); }
    }).unwrap();
    a.read_exact(&mut [0]).unwrap();
    let e = Command::new(&args[2]).args(&args[3..]).exec();
    eprintln!("exec {e}");
}
