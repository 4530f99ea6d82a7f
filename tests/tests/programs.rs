//! Real programs: outputs, status and files are those of the native run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::build::workspace;
use tests::compare::{Case, End, How, same, same_moved};
use tests::lab::Lab;
use tests::or_skip;
use tests::skip::{Skip, program};

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

/// A case that runs `command` with some of the files of `tests/programs` beside it.
fn with(files: &[&str], command: &[&str]) -> Case {
    let case = Case::new(command.iter().copied());
    files
        .iter()
        .fold(case, |case, file| case.tree(*file, source(file)))
}

/// An interpreter that is a program and not a version manager's script.
fn system(name: &str) -> Result<String, Skip> {
    let path = Path::new("/usr/bin").join(name);
    let path = if path.exists() { path } else { program(name)? };
    Ok(path.to_string_lossy().into_owned())
}

fn coreutils() -> Result<(Case, i32), Skip> {
    Ok((with(&["coreutils.sh"], &["bash", "coreutils.sh"]), 0))
}

fn shell() -> Result<(Case, i32), Skip> {
    Ok((with(&["shell.sh"], &["bash", "shell.sh"]), 42))
}

fn python() -> Result<(Case, i32), Skip> {
    let case = with(&["python.py"], &[&system("python3")?, "python.py"]);
    Ok((case.env("PYTHONDONTWRITEBYTECODE", "1"), 5))
}

fn multiprocess() -> Result<(Case, i32), Skip> {
    let case = with(
        &["multiprocess.py"],
        &[&system("python3")?, "multiprocess.py", "spawn"],
    );
    Ok((case.env("PYTHONDONTWRITEBYTECODE", "1"), 6))
}

fn perl() -> Result<(Case, i32), Skip> {
    Ok((with(&["perl.pl"], &[&system("perl")?, "perl.pl"]), 3))
}

fn node() -> Result<(Case, i32), Skip> {
    program("node")?;
    Ok((with(&["program.js"], &["node", "program.js"]), 9))
}

fn compile() -> Result<(Case, i32), Skip> {
    program("g++")?;
    let hello = "#include <iostream>\n#include <map>\n#include <thread>\nint main() { std::map<int, int> m; std::thread t([&] { m[1] = 2; }); t.join(); std::cout << m[1] << std::endl; return 4; }\n";
    let script = "gcc -O2 -fopenmp openmp.c -o openmp && ./openmp && g++ -O1 -c hello.cc && g++ hello.o -o hello && ./hello";
    Ok((
        with(&["openmp.c"], &["sh", "-c", script]).file("hello.cc", hello),
        4,
    ))
}

/// A real source package, with all that a parallel make starts. Every object is compared.
fn make() -> Result<(Case, i32), Skip> {
    let sources = workspace().join("target/sources/lua5.4");
    if !sources.join("Makefile").exists() {
        return Err(Skip::NoSources);
    }
    program("make")?;
    // Output comes in the order in which the compilers end, so it is sorted.
    let script = "make -C lua/src -j4 linux MYCFLAGS=-O1 > log 2>&1 || exit; sort log | grep -c gcc; rm log; \
                  lua/src/lua -e 'print(_VERSION, 6 * 7, #io.popen(\"seq 10\"):read(\"a\"))'";
    Ok((
        Case::new(["sh", "-c", script])
            .tree("lua", sources)
            .patience(Duration::from_secs(240)),
        0,
    ))
}

fn archives() -> Result<(Case, i32), Skip> {
    program("xz")?;
    program("7z")?;
    let script = r#"
set -e
for i in 1 2 3 4 5 6 7 8; do seq $((i * 1000)) $((i * 1000 + 60000)) > in/f$i; done
tar --sort=name --owner=0 --group=0 --mtime=@0 -cf t.tar in
xz -T2 -k --block-size=1MiB t.tar && xz -dc -T2 t.tar.xz | cmp - t.tar
gzip -nk t.tar && bzip2 -k t.tar && zcat t.tar.gz | cmp - t.tar
mkdir out && tar -C out -xJf t.tar.xz && diff -r in out/in && echo unpacked
7z a -bd -mmt2 -mx3 t.7z in > /dev/null && 7z t -bd t.7z | grep -c Everything && rm t.7z
tar -cf - in | (cd out && rm -rf in && tar -xf - && ls in)
"#;
    Ok((Case::new(["bash", "-c", script]).file("in/f0", "zero\n"), 0))
}

fn openssl() -> Result<(Case, i32), Skip> {
    program("openssl")?;
    let script = r#"
openssl speed -seconds 1 -bytes 1024 -multi 2 sha256 2>&1 | grep -c '^sha256'
seq 1 300000 > plain
openssl dgst -sha512 plain
openssl enc -aes-256-cbc -pbkdf2 -pass pass:x -S 0102030405060708 -in plain -out secret
openssl enc -d -aes-256-cbc -pbkdf2 -pass pass:x -S 0102030405060708 -in secret | cmp - plain && echo same
openssl genpkey -algorithm ed25519 -out key 2>/dev/null && openssl pkey -in key -pubout | head -1
rm key
"#;
    Ok((Case::bash(script), 0))
}

fn go() -> Result<(Case, i32), Skip> {
    program("go")?;
    let script = "export HOME=$PWD GOCACHE=$PWD/cache GOFLAGS=-mod=mod GO111MODULE=off && mkdir p && mv program.go p/ && \
                  (cd p && go build -o ../program) && rm -rf cache .config && ./program; s=$?; rm -f program; exit $s";
    Ok((
        with(&["program.go"], &["sh", "-c", script]).patience(Duration::from_secs(240)),
        8,
    ))
}

fn rust() -> Result<(Case, i32), Skip> {
    let rustc = program("rustc")?;
    // The compiler itself may be a version manager's; what is compared is what it makes.
    let script = "\"$0\" -O program.rs -o program && ./program 2>stderr; s=$?; grep -c 'on purpose' stderr; rm program stderr; exit $s";
    Ok((
        with(&["program.rs"], &["sh", "-c", script, &rustc.to_string_lossy()]),
        12,
    ))
}

/// The same, compiled before.
fn rust_program() -> Result<(Case, i32), Skip> {
    let script = "./program 2>stderr; s=$?; grep -c 'on purpose' stderr; rm stderr; exit $s";
    let program = tests::build::rust(&source("program.rs"))?;
    Ok((Case::new(["sh", "-c", script]).tree("program", program), 12))
}

fn java() -> Result<(Case, i32), Skip> {
    program("javac")?;
    let script = "javac Program.java && java -Xmx200m Program; s=$?; rm -f *.class; exit $s";
    Ok((
        with(&["Program.java"], &["sh", "-c", script]).patience(Duration::from_secs(240)),
        7,
    ))
}

fn sqlite() -> Result<(Case, i32), Skip> {
    program("sqlite3")?;
    let script = r#"
sqlite3 t.db 'create table t(a integer primary key, b text)'
for p in 1 2 3; do
    (for i in $(seq 1 20); do sqlite3 -cmd '.timeout 20000' t.db "insert into t(b) values('$p-$i')"; done) &
done
wait
sqlite3 t.db 'select count(*), count(distinct b) from t; pragma integrity_check'
sqlite3 t.db 'with recursive n(x) as (select 1 union all select x + 1 from n where x < 50000) select sum(x) from n'
sqlite3 t.db .dump | sort | head -3
rm t.db
"#;
    Ok((Case::bash(script), 0))
}

/// At home and away, each compared with one native run.
fn run(case: Result<(Case, i32), Skip>) {
    let (case, code) = or_skip!(case);
    let lab = or_skip!(Lab::shared());
    let native = same(&lab, &case, &[How::Home, How::Away(2)]);
    assert_eq!(native.end, End::Code(code), "natively: {native:?}");
}

/// While all its processes are moved from node to node and home.
fn run_moved(case: Result<(Case, i32), Skip>) {
    let (case, code) = or_skip!(case);
    let lab = or_skip!(Lab::shared());
    let (native, _) = same_moved(&lab, &case);
    assert_eq!(native.end, End::Code(code), "natively: {native:?}");
}

macro_rules! programs {
    ($($name:ident),* $(,)?) => {
        mod root {
            $(#[test] fn $name() { super::run(super::$name()); })*
        }
        mod moved {
            $(#[test] fn $name() { super::run_moved(super::$name()); })*
        }
    };
}

programs! {
    archives, compile, coreutils, go, java, make, multiprocess, node, openssl, perl, python, rust, shell, sqlite,
}

/// Away once more, with daemons and programs of a plain user.
fn run_plain(case: Result<(Case, i32), Skip>) {
    let (case, code) = or_skip!(case);
    let lab = or_skip!(Lab::plain(2));
    let native = same(&lab, &case, &[How::Away(2)]);
    assert_eq!(native.end, End::Code(code), "natively: {native:?}");
}

macro_rules! plain {
    ($($name:ident),* $(,)?) => {
        mod plain_user {
            $(#[test] fn $name() { super::run_plain(super::$name()); })*
        }
    };
}

// The compiler of Rust is where only its owner gets at it: what it makes is run.
plain! {
    archives, compile, coreutils, go, java, make, multiprocess, node, openssl, perl, python, rust_program, shell, sqlite,
}
