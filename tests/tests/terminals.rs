//! Programs at a terminal: job control, keys that are signals, full-screen programs.

use std::fs;

use tests::compare::{End, How, Place};
use tests::lab::Lab;
use tests::or_skip;
use tests::skip::program;
use tests::terminal::Terminal;

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

both! { a_shell_with_jobs, an_editor, a_pager, hanging_up }

fn check(body: fn(&Lab, How), how: How) {
    let lab = or_skip!(Lab::shared());
    body(&lab, how);
}

fn check_plain(body: fn(&Lab, How)) {
    let lab = or_skip!(Lab::plain(2));
    body(&lab, How::Away(2));
}

fn terminal(lab: &Lab, how: How, place: &Place, command: &[&str]) -> Terminal {
    let mut line = lab.exec(1);
    line.args(how.prefix()).args(command).current_dir(place.path());
    Terminal::start(&line)
}

fn a_shell_with_jobs(lab: &Lab, how: How) {
    let place = Place::made(lab);
    let mut t = terminal(lab, how, &place, &["bash", "--norc", "--noprofile", "-i"]);
    t.expect("$ ");
    t.send("tty; stty size\n");
    t.expect("/dev/pts/");
    t.expect("24 80");
    // Before its prompt the shell reads the size and sets it again (readline, set_winsize), and a change in between is lost, natively too.
    t.expect("$ ");
    t.resize(40, 120);
    t.send("stty size; echo $LINES\n");
    t.expect("40 120");
    t.send("sleep 1000\n");
    t.expect("sleep 1000\r\n");
    until_foreground(lab, "sleep 1000");
    t.send("\x03");
    t.expect("^C");
    t.send("echo code $((1000 + $?))\n");
    t.expect("code 1130");
    t.send("cat\n");
    t.expect("cat\r\n");
    until_foreground(lab, "cat");
    t.send("line\n");
    t.expect("line\r\nline\r\n");
    t.send("\x1a");
    t.expect("Stopped");
    t.send("jobs\n");
    t.expect("[1]+");
    t.send("bg\n");
    t.expect("[1]+ cat &");
    // In the background it may not read from the terminal. The shell tells before a prompt.
    t.send_until("\n", "Stopped");
    // What is typed while the shell changes the terminal's mode can be lost, natively too.
    for _ in 0..20 {
        t.send("fg\n");
        if tests::running::within(std::time::Duration::from_secs(2), || has_foreground(lab, "cat")) {
            break;
        }
    }
    t.send("again\n");
    t.expect("again\r\nagain\r\n");
    t.send("\x04");
    t.expect("$ ");
    t.send("sleep 1000 & kill %1; wait %1; echo code $((1000 + $?))\n");
    t.expect("code 1143");
    t.send("exit 4\n");
    assert_eq!(t.wait(), End::Code(4), "{how:?}");
}

fn until_foreground(lab: &Lab, arguments: &str) {
    tests::running::wait_for(
        "the command to have the terminal",
        std::time::Duration::from_secs(20),
        || has_foreground(lab, arguments),
    );
}

fn has_foreground(lab: &Lab, arguments: &str) -> bool {
    lab.inspect(1, "ps -e -o stat=,args=")
        .lines()
        .filter_map(|l| l.split_once(char::is_whitespace))
        .any(|(stat, args)| stat.contains('+') && args.trim() == arguments)
}

/// mosrun itself is a job of a shell: stopped, continued, sent to the background.
#[test]
fn as_a_job() {
    let lab = or_skip!(Lab::shared());
    let place = Place::made(&lab);
    let mut t = terminal(
        &lab,
        How::Native,
        &place,
        &["bash", "--norc", "--noprofile", "-i"],
    );
    t.expect("$ ");
    t.send("mosrun -r 2 cat\n");
    t.expect("cat\r\n");
    until_foreground(&lab, "cat");
    t.send("one\n");
    t.expect("one\r\none\r\n");
    t.send("\x1a");
    t.expect("Stopped");
    t.expect("$ ");
    t.send("fg\n");
    t.expect("mosrun -r 2 cat\r\n");
    until_foreground(&lab, "cat");
    t.send("two\n");
    t.expect("two\r\ntwo\r\n");
    t.send("\x03");
    t.expect("$ ");
    t.send("echo code $((1000 + $?))\n");
    t.expect("code 1130");
    t.send("exit\n");
    assert_eq!(t.wait(), End::Code(0));
}

fn an_editor(lab: &Lab, how: How) {
    or_skip!(program("vim"));
    let place = Place::made(lab);
    let mut t = terminal(
        lab,
        how,
        &place,
        &["vim", "-u", "NONE", "-N", "-n", "--cmd", "set report=0", "text"],
    );
    t.expect("[New]");
    t.send("ifirst line\rsecond line\x1b");
    t.expect("second line");
    t.send(":%s/line/LINE/g\r");
    t.expect("2 substitutions");
    t.send(":!echo from $((6 * 7))\r");
    t.expect("from 42");
    t.send("\r");
    t.resize(30, 90);
    t.send_until(":set lines? columns?\r", "lines=30");
    t.send("\r:wq\r");
    assert_eq!(t.wait(), End::Code(0), "{how:?}");
    assert_eq!(
        fs::read_to_string(place.path().join("text")).unwrap(),
        "first LINE\nsecond LINE\n"
    );
}

fn a_pager(lab: &Lab, how: How) {
    or_skip!(program("less"));
    let place = Place::made(lab);
    let mut t = terminal(lab, how, &place, &["bash", "-c", "seq 1 1000 | less"]);
    t.expect("1\r\n2\r\n");
    t.send("G");
    t.expect("1000");
    t.expect("(END)");
    t.send("/^77\\r\r");
    t.send("g");
    t.send("q");
    assert_eq!(t.wait(), End::Code(0), "{how:?}");
}

/// The end of the terminal reaches the program.
fn hanging_up(lab: &Lab, how: How) {
    let place = Place::made(lab);
    let t = {
        let mut t = terminal(
            lab,
            how,
            &place,
            &[
                "bash",
                "-c",
                "trap 'echo hup > hup; exit 9' HUP; echo ready; while :; do sleep 0.05; done",
            ],
        );
        t.expect("ready");
        t
    };
    t.hang_up();
    tests::running::wait_for("the trap", std::time::Duration::from_secs(20), || {
        place.path().join("hup").exists()
    });
}

#[test]
fn under_tmux() {
    let lab = or_skip!(Lab::shared());
    or_skip!(program("tmux"));
    let place = Place::made(&lab);
    let script = r#"
export TERM=xterm LC_ALL=C.UTF-8
tmux() { command tmux -L test -f /dev/null "$@"; }
tmux new-session -d -x 80 -y 24 'mosrun -r 2 bash --norc --noprofile -i'
tmux send-keys 'echo in $((40 + 2)); stty size' Enter
shown() { for i in $(seq 200); do tmux capture-pane -p | grep -q "$1" && return; sleep 0.05; done; tmux capture-pane -p; return 1; }
shown 'in 42' && shown '24 80' || exit 1
tmux send-keys 'sleep 1000' Enter; sleep 0.3; tmux send-keys C-c; tmux send-keys 'echo after $((1000 + $?))' Enter
shown 'after 1130' || exit 2
tmux resize-window -x 100 -y 30; tmux send-keys 'stty size' Enter; shown '30 100' || exit 3
tmux send-keys 'exit 0' Enter
for i in $(seq 200); do tmux has-session 2>/dev/null || exit 0; sleep 0.05; done; exit 4
"#;
    let output = lab
        .exec(1)
        .args(["bash", "-c", script])
        .current_dir(place.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", tests::lab::text(&output));
}
