use super::*;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

const LIMIT: u64 = MIN_BYTES;

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

fn page(n: u32) -> Vec<u8> {
    let mut page = vec![0xa5; PAGE_BYTES];
    page[..4].copy_from_slice(&n.to_le_bytes());
    page
}

fn hash(page: &[u8]) -> Hash {
    *blake3::hash(page).as_bytes()
}

fn insert(store: &PageStore, pages: std::ops::Range<u32>) {
    let pages: Vec<_> = pages.map(page).collect();
    store.insert(pages.iter().map(Vec::as_slice)).unwrap();
}

fn has(store: &PageStore, n: u32) -> bool {
    let mut got = [0; PAGE_BYTES];
    let there = store.get(&hash(&page(n)), &mut got);
    assert!(!there || got[..] == page(n)[..]);
    there
}

fn disk_bytes(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).unwrap();
    files.map(|f| f.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn what_was_put_in_is_there_for_everybody_and_later() {
    let dir = directory();
    let (first, second) = (
        PageStore::open(dir.path(), LIMIT).unwrap(),
        PageStore::open(dir.path(), LIMIT).unwrap(),
    );
    assert!(!has(&first, 1));
    insert(&first, 1..10);
    insert(&second, 5..20);
    assert!((1..20).all(|n| has(&first, n) && has(&second, n)));
    assert!(!has(&first, 20));
    assert_eq!(second.known(100).len(), 19);
    assert_eq!(second.known(3).len(), 3);
    first.flush().unwrap();
    second.flush().unwrap();
    drop((first, second));
    let later = PageStore::open(dir.path(), LIMIT).unwrap();
    assert_eq!(later.len(), 19);
    assert!(has(&later, 19));
    let counts = Counts::of(dir.path()).unwrap();
    assert_eq!(
        (
            counts.entries,
            counts.inserted,
            counts.hits,
            counts.evicted,
            counts.corrupt
        ),
        (19, 19, 38, 0, 0)
    );
    assert_eq!(counts.saved_bytes, 38 * PAGE);
}

#[test]
fn it_never_has_more_bytes_than_its_limit_and_the_oldest_go() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    let slots = slots_for(LIMIT);
    insert(&store, 0..slots);
    // What is put in once more has been used.
    insert(&store, 0..10);
    for round in 1..40 {
        insert(&store, round * slots / 4..round * slots / 4 + slots / 2);
        insert(&store, 0..10);
        assert!(disk_bytes(dir.path()) <= LIMIT, "{}", disk_bytes(dir.path()));
        assert!(store.len() <= slots as usize);
    }
    assert!((0..10).all(|n| has(&store, n)));
    assert!(!has(&store, 11));
    // What was taken out has been used as well.
    store.flush().unwrap();
    insert(&store, 5000..5000 + slots - 10);
    assert!((0..10).all(|n| has(&store, n)));
    store.flush().unwrap();
    let counts = Counts::of(dir.path()).unwrap();
    assert!(counts.evicted > u64::from(slots) && counts.bytes <= LIMIT);
    assert_eq!(counts.entries, store.len() as u64);
    // A large process does not push out more than there is room for.
    insert(&store, 10_000..10_000 + 3 * slots);
    assert!(has(&store, 10_000) && !has(&store, 10_000 + 2 * slots));
}

#[test]
fn zeros_and_parts_of_pages_are_not_kept() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    let pages = [vec![0; PAGE_BYTES], vec![7; 100], page(1), page(1)];
    store.insert(pages.iter().map(Vec::as_slice)).unwrap();
    assert_eq!(store.len(), 1);
}

#[test]
fn a_page_that_is_not_what_it_should_be_reaches_nobody() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    insert(&store, 0..8);
    let file = File::options()
        .read(true)
        .write(true)
        .open(dir.path().join("pages"))
        .unwrap();
    // A rotten bit, another page of the store in its place, and one that was cut off.
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 100).unwrap();
    let mut other = [0; PAGE_BYTES];
    file.read_exact_at(&mut other, 4 * PAGE).unwrap();
    file.write_all_at(&other, 3 * PAGE).unwrap();
    file.set_len(7 * PAGE).unwrap();
    let gone: Vec<u32> = (0..8).filter(|n| !has(&store, *n)).collect();
    assert_eq!(gone, [0, 3, 7]);
    assert_eq!(store.len(), 5);
    store.flush().unwrap();
    assert_eq!(Counts::of(dir.path()).unwrap().corrupt, 3);
    // They can be put in again.
    insert(&store, 0..8);
    assert!((0..8).all(|n| has(&store, n)));
}

#[test]
fn the_files_do_not_show_what_is_in_the_pages() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    insert(&store, 0..8);
    for name in ["pages", "journal", "counts"] {
        let bytes = std::fs::read(dir.path().join(name)).unwrap();
        let run = bytes.windows(16).any(|w| w.iter().all(|b| *b == 0xa5));
        assert!(!run, "{name} shows the content of pages");
    }
}

#[test]
fn a_damaged_journal_is_begun_anew_and_a_torn_end_is_cut_off() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    insert(&store, 0..8);
    let path = dir.path().join("journal");
    let mut bytes = std::fs::read(&path).unwrap();
    // Who wrote it died in the middle of a record.
    std::fs::write(&path, [&bytes[..], &[9; 5]].concat()).unwrap();
    let second = PageStore::open(dir.path(), LIMIT).unwrap();
    insert(&second, 8..10);
    assert!((0..10).all(|n| has(&second, n)));
    assert!((0..10).all(|n| has(&store, n)));
    bytes[HEADER_BYTES + 20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let third = PageStore::open(dir.path(), LIMIT).unwrap();
    assert_eq!(third.len(), 0);
    insert(&third, 0..8);
    insert(&second, 20..22);
    assert!((0..8).chain(20..22).all(|n| has(&third, n) && has(&second, n)));
    // No journal at all.
    std::fs::write(&path, b"not a journal").unwrap();
    insert(&second, 30..31);
    assert!(has(&third, 30));
    assert!(Counts::of(dir.path()).unwrap().corrupt >= 2);
}

#[test]
fn the_last_to_open_it_says_how_large_it_is() {
    let dir = directory();
    let large = PageStore::open(dir.path(), 4 * LIMIT).unwrap();
    insert(&large, 0..900);
    assert!(disk_bytes(dir.path()) > LIMIT);
    let small = PageStore::open(dir.path(), LIMIT).unwrap();
    assert!(disk_bytes(dir.path()) <= LIMIT);
    insert(&large, 2000..2900);
    assert!(disk_bytes(dir.path()) <= LIMIT, "{}", disk_bytes(dir.path()));
    assert_eq!(large.len(), small.known(usize::MAX).len());
}

#[test]
fn others_directories_are_refused() {
    let dir = directory();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o750)).unwrap();
    assert!(PageStore::open(dir.path(), LIMIT).is_err());
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let link = tempfile::tempdir().unwrap();
    let to = link.path().join("store");
    std::os::unix::fs::symlink(dir.path(), &to).unwrap();
    assert!(PageStore::open(&to, LIMIT).is_err());
    assert!(PageStore::open(&dir.path().join("none"), LIMIT).is_err());
    // A link in place of a file leads nowhere.
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("pages")).unwrap();
    assert!(PageStore::open(dir.path(), LIMIT).is_err());
}

/// Who holds the lock and is stopped keeps nobody waiting for long.
#[test]
fn a_lock_that_is_not_given_back_is_not_waited_for() {
    let dir = directory();
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    insert(&store, 0..2);
    let journal = File::open(dir.path().join("journal")).unwrap();
    let held = Flock::lock(journal, FlockArg::LockExclusive).unwrap();
    let begun = Instant::now();
    assert!(store.insert([page(5)].iter().map(Vec::as_slice)).is_err());
    assert!(begun.elapsed() >= PATIENCE && begun.elapsed() < 20 * PATIENCE);
    assert!(has(&store, 1), "reading needs no lock");
    drop(held);
    insert(&store, 5..6);
    assert!(has(&store, 5));
}

/// The variable by which a test tells the process that it starts what it is to do there.
const CHILD: &str = "MOSRUN_TEST_PAGESTORE";

/// Runs one test of this file again in a process of its own.
fn child(test: &str, told: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", &format!("pagestore::tests::{test}")])
        .env(CHILD, told);
    command
}

fn told() -> Option<(PathBuf, u32)> {
    let told = std::env::var(CHILD).ok()?;
    let (number, dir) = told.split_once(' ')?;
    Some((dir.into(), number.parse().ok()?))
}

/// Several processes put in, take out and make room at once; one of them is killed again and again.
#[test]
fn several_processes_at_once() {
    if let Some((dir, number)) = told() {
        let store = PageStore::open(&dir, LIMIT).unwrap();
        let slots = slots_for(LIMIT);
        for round in 0..if number == 0 { u32::MAX } else { 30 } {
            let from = (round * 37 + number * 11) % (2 * slots);
            // The lock may be held by somebody who does not get to run.
            let pages: Vec<_> = (from..from + 60).map(page).collect();
            let _ = store.insert(pages.iter().map(Vec::as_slice));
            for n in from..from + 60 {
                let _ = has(&store, n);
            }
        }
        store.flush().unwrap();
        return;
    }
    let dir = directory();
    let start = |number: u32| {
        let told = format!("{number} {}", dir.path().display());
        child("several_processes_at_once", &told).spawn().unwrap()
    };
    let mut workers: Vec<_> = (1..4).map(start).collect();
    let mut killed = 0;
    while workers.iter_mut().any(|w| w.try_wait().unwrap().is_none()) {
        let mut victim = start(0);
        std::thread::sleep(Duration::from_millis(15 + killed % 7 * 5));
        victim.kill().unwrap();
        victim.wait().unwrap();
        killed += 1;
    }
    for worker in &mut workers {
        assert!(worker.wait().unwrap().success());
    }
    assert!(killed > 0);
    assert!(disk_bytes(dir.path()) <= LIMIT);
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    let there = (0..3 * slots_for(LIMIT)).filter(|n| has(&store, *n)).count();
    assert!(there > 0 && store.len() <= slots_for(LIMIT) as usize);
    insert(&store, 0..20);
    assert!((0..20).all(|n| has(&store, n)));
}

/// With room for less than the store wants, what went in is there and the rest is an error.
#[test]
fn a_full_disk_is_an_error_and_no_more() {
    if let Some((dir, _)) = told() {
        nix::sys::signal::SigSet::from_iter([nix::sys::signal::Signal::SIGXFSZ])
            .thread_block()
            .unwrap();
        let store = PageStore::open(&dir, LIMIT).unwrap();
        let most = 20 * PAGE + 100;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, most, most).unwrap();
        let pages: Vec<_> = (0..100).map(page).collect();
        let full = store.insert(pages.iter().map(Vec::as_slice)).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::EFBIG));
        assert!((0..20).all(|n| has(&store, n)) && !has(&store, 20));
        // Not even the journal has room.
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, 300, most).unwrap();
        assert!(store.insert(pages[..10].iter().map(Vec::as_slice)).is_err());
        assert!((0..20).all(|n| has(&store, n)));
        return;
    }
    let dir = directory();
    let told = format!("1 {}", dir.path().display());
    // Its limit holds for what it says as well, if that goes to a file.
    let output = child("a_full_disk_is_an_error_and_no_more", &told).output();
    assert!(output.as_ref().unwrap().status.success(), "{output:?}");
    // The next one has room, and finds everything in order.
    let store = PageStore::open(dir.path(), LIMIT).unwrap();
    assert!((0..20).all(|n| has(&store, n)));
    insert(&store, 0..100);
    assert!((0..100).all(|n| has(&store, n)));
}
