//! The source itself: what reviewers would otherwise have to look for. None of it needs a lab, or root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::build::workspace;

/// A file about one subject has no more lines than this.
const MAX_LINES: usize = 900;

/// The documents that people read first.
const DOCUMENTS: [&str; 6] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/STAY-REASONS.md",
    "docs/SYSCALLS.md",
];

/// All files of the repository, relative to its top, without what is built or fetched.
fn files() -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a directory").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if name == "target" || name == ".git" {
                continue;
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                walk(&path, found);
            } else {
                found.push(path);
            }
        }
    }
    let top = workspace();
    let mut found = Vec::new();
    walk(top, &mut found);
    found.sort();
    found
        .iter()
        .map(|p| p.strip_prefix(top).expect("a file of the workspace").to_owned())
        .collect()
}

fn with_extension(extension: &str) -> Vec<(PathBuf, String)> {
    let of_interest = |p: &PathBuf| p.extension().is_some_and(|e| e == extension);
    files()
        .into_iter()
        .filter(of_interest)
        .map(|p| {
            let text = fs::read_to_string(workspace().join(&p)).expect("text");
            (p, text)
        })
        .collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

/// The line without its comment, and without what is quoted.
fn code(line: &str) -> String {
    let mut out = String::new();
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => {
                chars.next();
            }
            '"' => quoted = !quoted,
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => out.push(c),
        }
    }
    out
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// A test that runs a program in the wrong directory leaves its files there.
#[test]
fn nothing_strange_is_at_the_top() {
    const KNOWN: [&str; 10] = [
        ".gitignore",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "README.md",
        "rustfmt.toml",
    ];
    let at_the_top = files().into_iter().filter(|path| path.components().count() == 1);
    let strange: Vec<_> = at_the_top
        .map(|path| path.display().to_string())
        .filter(|path| !KNOWN.contains(&path.as_str()))
        .collect();
    assert_none("files that do not belong there", &strange);
}

#[test]
fn unsafe_code_is_in_shim_alone() {
    let found: Vec<_> = with_extension("rs")
        .into_iter()
        .filter(|(path, _)| !path.starts_with("shim"))
        .filter(|(_, text)| text.lines().any(|l| words(&code(l)).any(|w| w == "unsafe")))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert_none("unsafe outside of shim", &found);
    let manifests: Vec<_> = with_extension("toml")
        .into_iter()
        .filter(|(path, _)| path.file_name().is_some_and(|n| n == "Cargo.toml"))
        .filter(|(path, text)| {
            let own = path.starts_with("shim") || path == Path::new("Cargo.toml");
            !own && !text.contains("[lints]\nworkspace = true")
        })
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert_none(
        "crates that do not take the workspace's lints, which forbid it",
        &manifests,
    );
    assert!(read("Cargo.toml").contains("unsafe_code = \"forbid\""));
}

#[test]
fn files_have_one_subject() {
    let found: Vec<_> = with_extension("rs")
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .map(|(path, lines)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert_none(&format!("files of more than {MAX_LINES} lines"), &found);
}

#[test]
fn nothing_is_left_for_later() {
    let macros = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let marks = ["TODO", "FIXME", "XXX"];
    let mut found = Vec::new();
    for (path, text) in with_extension("rs") {
        if path.ends_with("tests/tests/tidy.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let left = macros.iter().any(|m| code(line).contains(m.as_str()))
                || words(line).any(|w| marks.contains(&w));
            if left {
                found.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("things left for later", &found);
}

/// Variants of the enum in the file that have no documentation.
fn undocumented(path: &str, name: &str) -> Vec<String> {
    let text = read(path);
    let start = text
        .find(&format!("pub enum {name} {{"))
        .unwrap_or_else(|| panic!("{path} has no enum {name}"));
    let mut found = Vec::new();
    let mut documented = false;
    let mut variants = 0;
    for line in text[start..].lines().skip(1).take_while(|l| *l != "}") {
        let variant = line
            .strip_prefix("    ")
            .filter(|l| l.starts_with(|c: char| c.is_ascii_uppercase()));
        if line.starts_with("    ///") {
            documented = true;
        } else if let Some(variant) = variant {
            variants += 1;
            if !documented {
                found.push(format!("{path}: {name}::{variant}"));
            }
            documented = false;
        }
    }
    assert!(variants > 2, "{path}: {name} was not understood");
    found
}

#[test]
fn what_travels_is_documented() {
    let found: Vec<_> = [
        ("linklayer/src/wire.rs", "Kind"),
        ("linklayer/src/stay.rs", "StayReason"),
        ("linklayer/src/syscall/home.rs", "HomeReason"),
        ("linklayer/src/syscall/kind.rs", "SplitKind"),
    ]
    .into_iter()
    .flat_map(|(path, name)| undocumented(path, name))
    .collect();
    assert_none("variants without documentation", &found);
}

/// Numbers on the wire are never given twice, and reading knows all that writing knows.
#[test]
fn every_kind_can_be_read() {
    let text = read("linklayer/src/wire.rs");
    let start = text.find("pub enum Kind {").expect("Kind");
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for line in text[start..].lines().skip(1).take_while(|l| *l != "}") {
        if let Some((name, number)) = line.trim().trim_end_matches(',').split_once(" = ")
            && !line.trim().starts_with('/')
        {
            names.insert(name.to_owned());
            assert!(numbers.insert(number.to_owned()), "{number} is given twice");
        }
    }
    let all = text.split("const ALL").nth(1).expect("the list of all kinds");
    let all = all.split('=').nth(1).and_then(|l| l.split("];").next());
    let listed: BTreeSet<_> = words(all.expect("the list's end"))
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect();
    assert_eq!(names, listed);
}

#[test]
fn generated_documents_are_what_mosctl_prints() {
    for (verb, document) in [
        ("syscalls", "docs/SYSCALLS.md"),
        ("stay-reasons", "docs/STAY-REASONS.md"),
    ] {
        let output = Command::new(tests::build::programs().join("mosctl"))
            .args([verb, "--markdown"])
            .output()
            .expect("mosctl can be started");
        assert!(output.status.success());
        assert!(
            output.stdout == read(document).into_bytes(),
            "write {document} anew: mosctl {verb} --markdown > {document}"
        );
    }
}

/// Whether a quoted word of a document is meant as a file of the repository.
fn names_a_file(word: &str) -> bool {
    const TOPS: [&str; 11] = [
        "linklayer/",
        "shim/",
        "deputy/",
        "runtime/",
        "tests/",
        "bench/",
        "scripts/",
        "docs/",
        "contrib/",
        ".ci/",
        ".config/",
    ];
    let clean = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let top_level = !word.contains('/') && word.ends_with(".md");
    word.chars().all(clean) && (TOPS.iter().any(|t| word.starts_with(t)) || top_level)
}

#[test]
fn documents_name_files_and_tests_that_exist() {
    let sources: String = with_extension("rs").into_iter().map(|(_, text)| text).collect();
    let mut found = Vec::new();
    for document in DOCUMENTS {
        let text = read(document);
        for (number, line) in text.lines().enumerate() {
            let at = format!("{document}:{}", number + 1);
            let quoted = line.split('`').skip(1).step_by(2);
            let linked = line
                .split("](")
                .skip(1)
                .filter_map(|rest| rest.split(')').next())
                .filter(|target| !target.contains("://") && !target.starts_with('#'))
                .map(|target| target.split('#').next().unwrap_or(target));
            for word in quoted.clone().filter(|w| names_a_file(w)).chain(linked) {
                let near = Path::new(document).parent().unwrap_or(Path::new("")).join(word);
                if !workspace().join(word).exists() && !workspace().join(near).exists() {
                    found.push(format!("{at}: {word}"));
                }
            }
            // A test is quoted with the word in front: test `name`.
            for rest in line.split("test `").skip(1) {
                let name = rest.split('`').next().unwrap_or_default();
                let name = name.rsplit("::").next().unwrap_or(name);
                if !sources.contains(&format!("fn {name}(")) {
                    found.push(format!("{at}: test {name}"));
                }
            }
        }
    }
    assert_none("files and tests that do not exist", &found);
}

/// What is written here is true on every machine.
#[test]
fn no_paths_of_one_machine() {
    let mut places = vec![workspace().canonicalize().expect("the workspace")];
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from)
        && home.components().count() > 2
    {
        places.push(home);
    }
    let mut found = Vec::new();
    let text_files = files().into_iter().filter(|p| {
        let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        name != "Cargo.lock" && !name.starts_with("LICENSE")
    });
    for path in text_files {
        let Ok(text) = fs::read_to_string(workspace().join(&path)) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            let own = places.iter().any(|p| line.contains(&*p.to_string_lossy()));
            if own {
                found.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("paths of one machine", &found);
}

/// The two commands of README are there, can be executed, and are what continuous integration runs.
#[test]
fn the_commands_of_the_readme() {
    use std::os::unix::fs::PermissionsExt;
    let readme = read("README.md");
    for command in ["scripts/demo", "scripts/test", "scripts/prepare", ".ci/run"] {
        let metadata = fs::metadata(workspace().join(command)).unwrap_or_else(|e| panic!("{command}: {e}"));
        assert_ne!(
            metadata.permissions().mode() & 0o111,
            0,
            "{command} cannot be executed"
        );
    }
    assert!(readme.contains("scripts/demo") && readme.contains("scripts/test"));
    assert!(
        read(".ci/run")
            .lines()
            .any(|l| l.trim_end().ends_with("scripts/test"))
    );
}
