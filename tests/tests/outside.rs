//! What others at home see of a program, and do to it, while it is away.

use std::time::Duration;

use tests::compare::{End, How, Place};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

const AWAY: How = How::Away(2);

macro_rules! both {
    ($($name:ident),* $(,)?) => {
        // Natively, which shows that the check itself is right, and away.
        mod native {
            $(#[test] fn $name() { super::check(super::$name, super::How::Native); })*
        }
        mod away {
            $(#[test] fn $name() { super::check(super::$name, super::How::Away(2)); })*
        }
        // With daemons and programs of a plain user.
        mod plain_user {
            $(#[test] fn $name() { super::check_plain(super::$name); })*
        }
    };
}

both! { killed_by_pid, a_handler_sees_who_sent, seen_in_proc, stopped_and_continued, as_a_job_of_a_shell, a_server_used_from_home }

fn check(body: fn(&Lab, How), how: How) {
    let lab = or_skip!(Lab::shared());
    body(&lab, how);
}

fn check_plain(body: fn(&Lab, How)) {
    let lab = or_skip!(Lab::plain(2));
    body(&lab, How::Away(2));
}

fn sh(lab: &Lab, script: &str) -> String {
    let output = lab
        .exec(1)
        .args(["sh", "-c", script])
        .output()
        .expect("mosctl can be started");
    assert!(output.status.success(), "{script}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

#[test]
fn it_is_really_away() {
    let lab = or_skip!(Lab::shared());
    let mut running = Running::start(
        &lab,
        AWAY,
        [
            "python3",
            "-c",
            "import os\nprint(os.getpid(), flush=True)\nwhile True: pass",
        ],
    );
    let pid = running.number();
    let busy = |node: u32| {
        // Time that processes of the node have used, in seconds.
        let times = lab.inspect(node, "ps -e -o cputimes=,comm=");
        times
            .lines()
            .filter(|l| !l.contains("mosd"))
            .filter_map(|l| l.split_whitespace().next()?.parse::<u64>().ok())
            .sum::<u64>()
    };
    wait_for(
        "the program to compute on node 2",
        Duration::from_secs(20),
        || busy(2) >= 2,
    );
    let home: u64 = sh(&lab, &format!("ps -o cputimes= -p {pid}"))
        .trim()
        .parse()
        .unwrap();
    let list = sh(&lab, "mosps --json");
    assert!(list.contains(&pid.to_string()), "{list}");
    sh(&lab, &format!("kill -KILL {pid}"));
    assert_eq!(running.wait(), End::Signal(9));
    assert!(home < 2, "the program used {home} s at home");
}

fn killed_by_pid(lab: &Lab, how: How) {
    for (signal, number) in [("TERM", 15), ("KILL", 9), ("INT", 2), ("USR1", 10), ("SEGV", 11)] {
        let mut running = Running::script(lab, how, "ulimit -c 0; echo $$; exec sleep 1000");
        let pid = running.number();
        wait_for("sleep", Duration::from_secs(10), || {
            sh(lab, &format!("cat /proc/{pid}/comm")) == "sleep"
        });
        sh(lab, &format!("kill -{signal} {pid}"));
        assert_eq!(running.wait(), End::Signal(number), "{how:?} {signal}");
    }
}

fn a_handler_sees_who_sent(lab: &Lab, how: How) {
    let script = "
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print(os.getpid(), flush=True)
info = signal.sigwaitinfo([signal.SIGUSR1])
print(info.si_pid, info.si_uid, info.si_code, flush=True)
";
    let mut running = Running::start(lab, how, ["python3", "-c", script]);
    let pid = running.number();
    let sender = sh(lab, &format!("echo $$; kill -USR1 {pid}"));
    let user = lab.user().unwrap_or(0);
    assert_eq!(running.line(), format!("{sender} {user} 0"), "{how:?}");
    assert_eq!(running.wait(), End::Code(0));
}

fn seen_in_proc(lab: &Lab, how: How) {
    let place = Place::made(lab);
    let mut command = lab.exec(1);
    command.args(how.prefix()).args([
        "bash",
        "-c",
        "exec 7>opened; echo $$; read line; exit 3",
        "name",
        "argument",
    ]);
    command.current_dir(place.path()).env("SEEN", "yes");
    let mut running = Running::spawn(command);
    let pid = running.number();
    wait_for("it to wait", Duration::from_secs(10), || {
        sh(lab, &format!("ps -o stat= -p {pid}")).starts_with('S')
    });
    let seen = |what: &str| sh(lab, &what.replace("PID", &pid.to_string()));
    assert_eq!(seen("ps -o comm= -p PID"), "bash");
    assert!(seen("ps -o args= -p PID").ends_with("name argument"), "{how:?}");
    assert_eq!(seen("readlink /proc/PID/cwd"), place.path().to_string_lossy());
    assert!(seen("readlink /proc/PID/exe").ends_with("/bash"));
    assert_eq!(
        seen("readlink /proc/PID/fd/7"),
        place.path().join("opened").to_string_lossy()
    );
    let open = seen("ls /proc/PID/fd");
    for fd in ["0", "1", "2", "7"] {
        assert!(open.lines().any(|l| l == fd), "{how:?}: {open}");
    }
    assert!(seen("tr '\\0' '\\n' < /proc/PID/environ").contains("SEEN=yes"));
    let user = lab.user().unwrap_or(0);
    assert_eq!(seen("ps -o uid= -p PID").trim(), user.to_string());
    assert_eq!(seen("pgrep -f '[n]ame argument' | grep -c '^PID$'"), "1");
    // A process away has a thread at home that takes its signals.
    let threads: u32 = seen("ls -d /proc/PID/task/* | wc -l").parse().unwrap();
    assert!(threads == 1 || how == AWAY && threads == 2, "{how:?}: {threads}");
    let name = place.path().join("opened");
    if program("lsof").is_ok() {
        assert!(
            seen(&format!("lsof -w -t {}", name.display())).contains(&pid.to_string()),
            "{how:?}"
        );
    }
    if program("fuser").is_ok() {
        assert!(
            seen(&format!("fuser {} 2>/dev/null", name.display())).contains(&pid.to_string()),
            "{how:?}"
        );
    }
    assert_eq!(
        seen("renice -n 5 -p PID >/dev/null; ps -o ni= -p PID").trim(),
        "5"
    );
    running.write("go\n");
    assert_eq!(running.wait(), End::Code(3));
}

fn stopped_and_continued(lab: &Lab, how: How) {
    let mut running = Running::script(lab, how, "echo $$; while read line; do echo \"got $line\"; done");
    let pid = running.number();
    running.write("one\n");
    assert_eq!(running.line(), "got one");
    sh(lab, &format!("kill -STOP {pid}"));
    wait_for("the stop", Duration::from_secs(10), || {
        sh(lab, &format!("ps -o stat= -p {pid}"))
            .to_uppercase()
            .starts_with('T')
    });
    running.write("two\n");
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        sh(lab, &format!("ps -o stat= -p {pid}"))
            .to_uppercase()
            .starts_with('T'),
        "{how:?}"
    );
    sh(lab, &format!("kill -CONT {pid}"));
    assert_eq!(running.line(), "got two");
    assert_eq!(running.wait(), End::Code(0));
}

fn as_a_job_of_a_shell(lab: &Lab, how: How) {
    let words = how.prefix();
    let mosrun: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
    let mosrun = mosrun.join(" ");
    let script = format!(
        "{mosrun} sleep 0.2 & wait $!; echo $?
         {mosrun} sh -c 'exit 3' & wait $!; echo $?
         {mosrun} sleep 1000 & kill $!; wait $!; echo $?
         {mosrun} sleep 1000 & kill -9 $!; wait $!; echo $?
         timeout 0.3 {mosrun} sleep 1000; echo $?
         timeout -s KILL 0.3 {mosrun} sleep 1000; echo $?
         echo input | {mosrun} cat | {mosrun} tr a-z A-Z
         ({mosrun} sh -c 'kill -TERM $$'); echo $?
         x=$({mosrun} echo substituted); echo $x
         {mosrun} sh -c 'exit 7' || echo $?
         {mosrun} yes | head -1; echo ${{PIPESTATUS[*]}}"
    );
    let mut command = lab.exec(1);
    let output = command.args(["bash", "-c", &script]).output().unwrap();
    let expected = "0\n3\n143\n137\n124\n137\nINPUT\n143\nsubstituted\n7\ny\n141 0\n";
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        expected,
        "{how:?}: {}",
        text(&output)
    );
}

/// Nothing can trace a process that is traced already; what says so has to say why.
#[test]
fn tracing_is_refused() {
    let lab = or_skip!(Lab::shared());
    or_skip!(program("strace"));
    let mut running = Running::script(&lab, AWAY, "echo $$; read line");
    let pid = running.number();
    let output = lab
        .exec(1)
        .args(["strace", "-p", &pid.to_string()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("Operation not permitted"),
        "{}",
        text(&output)
    );
    running.write("go\n");
    assert_eq!(running.wait(), End::Code(0));
}

#[test]
fn brought_home() {
    let lab = or_skip!(Lab::shared());
    let script = "
import os, sys, threading
n = 0
def count():
    global n
    while True: n += 1
threading.Thread(target=count, daemon=True).start()
f = open('/proc/self/comm')
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(line.strip(), n > 0, f.fileno(), flush=True)
sys.exit(6)
";
    let mut running = Running::start(&lab, AWAY, ["python3", "-c", script]);
    let pid = running.number();
    running.write("away\n");
    assert_eq!(running.line(), "away True 3");
    sh(&lab, &format!("mosmigrate {pid} home"));
    running.write("home\n");
    assert_eq!(running.line(), "home True 3");
    let used = || {
        sh(&lab, &format!("ps -o cputimes= -p {pid}"))
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    let before = used();
    wait_for("it to compute at home", Duration::from_secs(20), || {
        used() > before
    });
    running.write("still\n");
    assert_eq!(running.line(), "still True 3");
    assert_eq!(running.wait(), End::Code(6));
}

#[test]
fn the_list_of_programs() {
    let lab = or_skip!(Lab::shared());
    let mut away = Running::script(&lab, AWAY, "echo $$; read line");
    let mut home = Running::script(&lab, How::Home, "echo $$; read line");
    let (away_pid, home_pid) = (away.number(), home.number());
    let list: serde_json::Value = serde_json::from_str(&sh(&lab, "mosps --json")).expect("JSON");
    let text = list.to_string();
    assert!(
        text.contains(&away_pid.to_string()) && text.contains(&home_pid.to_string()),
        "{text}"
    );
    let table = sh(&lab, "mosps");
    assert!(
        table.lines().any(|l| l.contains(&away_pid.to_string())),
        "{table}"
    );
    away.write("\n");
    home.write("\n");
    assert_eq!((away.wait(), home.wait()), (End::Code(0), End::Code(0)));
}

/// A database at home is written by a program at home and one away at the same time.
#[test]
fn a_database_shared_with_home() {
    let lab = or_skip!(Lab::shared());
    or_skip!(program("sqlite3"));
    let place = Place::made(&lab);
    let script = "
sqlite3 t.db 'pragma journal_mode=delete; create table t(who text, n integer)' > /dev/null
writer() { for i in $(seq 1 25); do $2 sqlite3 -cmd '.timeout 30000' t.db \"insert into t values('$1', $i)\" || exit 1; done; }
writer home & a=$!
mosrun -r 2 bash -c \"$(declare -f writer); writer away\" & b=$!
wait $a && wait $b && sqlite3 t.db 'select who, count(*), sum(n) from t group by who order by who; pragma integrity_check'
";
    let output = lab
        .exec(1)
        .args(["bash", "-c", script])
        .current_dir(place.path())
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "away|25|325\nhome|25|325\nok\n",
        "{}",
        text(&output)
    );
}

/// A server away is used by its clients at home, over the loopback interface.
fn a_server_used_from_home(lab: &Lab, how: How) {
    or_skip!(program("redis-server"));
    let place = Place::made(lab);
    let words: Vec<_> = how
        .prefix()
        .iter()
        .map(|w| w.to_string_lossy().into_owned())
        .collect();
    let script = format!(
        "{} redis-server --port 7777 --bind 127.0.0.1 --dir . --save '' --daemonize no > log 2>&1 & server=$!
cli() {{ redis-cli -p 7777 \"$@\"; }}
for i in $(seq 200); do cli ping 2>/dev/null | grep -q PONG && break; sleep 0.05; done
cli set key value; cli get key
for i in $(seq 1 50); do echo \"rpush list $i\"; done | cli > /dev/null
cli llen list; cli lrange list 0 2
redis-benchmark -p 7777 -q -n 2000 -c 10 -t set,get 2>&1 | grep -c 'requests per second'
cli bgsave > /dev/null; for i in $(seq 100); do [ -s dump.rdb ] && break; sleep 0.05; done; ls dump.rdb
cli shutdown nosave; wait $server; echo $?",
        words.join(" ")
    );
    let output = lab
        .exec(1)
        .args(["bash", "-c", &script])
        .current_dir(place.path())
        .output()
        .unwrap();
    let expected = "OK\nvalue\n50\n1\n2\n3\n2\ndump.rdb\n0\n";
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        expected,
        "{how:?}: {}",
        text(&output)
    );
}
