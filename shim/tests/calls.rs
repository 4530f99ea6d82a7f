//! Forwarded calls against the real kernel: the same call is made natively, and once more by way of the table, with this
//! process as guest and as vessel. Results, errors and memory must be equal.

use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use linklayer::memory::HOLE;
use linklayer::syscall::{
    CallView, Dir, Disposition, GatherError, Kind, Reply, Row, SLOT_DATA_LEN, Scalar, SplitKind, Step,
    collect, gather, place, resolve, rows,
};
use shim::memory::ProcessMemory;

/// Makes a call with registers as they are; an error is its errno, negated, as the kernel gives it.
fn native(nr: u32, args: [u64; 6]) -> i64 {
    // SAFETY: the tests call only what leaves the process's own memory alone, except for the buffers they name.
    let ret = unsafe {
        libc::syscall(
            i64::from(nr),
            args[0],
            args[1],
            args[2],
            args[3],
            args[4],
            args[5],
        )
    };
    if ret == -1 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        ret
    }
}

/// What became of a call.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    Result(i64),
    Home,
}

/// A slot's data area: page-aligned, as in the arena.
struct Slot {
    start: *mut u8,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            start: map(SLOT_DATA_LEN, libc::PROT_READ | libc::PROT_WRITE) as *mut u8,
        }
    }

    fn answer(&self, request: &linklayer::syscall::CallRequest) -> Vec<u8> {
        let mut wire = Vec::new();
        request.encode(&mut wire);
        let view = CallView::parse(&wire).unwrap();
        // SAFETY: the mapping is this long and lives to the end of the process; one slot is used by one test.
        let data = unsafe { std::slice::from_raw_parts_mut(self.start, SLOT_DATA_LEN) };
        let args = place(&view, data, self.start as u64).unwrap();
        let ret = native(view.nr, args);
        let mut reply = Vec::new();
        collect(&view, data, ret, &mut reply).unwrap();
        reply
    }

    fn forwarded(&self, nr: u32, args: [u64; 6]) -> Way {
        let memory = ProcessMemory::new(std::process::id() as i32);
        match gather(nr, &args, &memory) {
            Ok(gathered) => {
                let reply = self.answer(&gathered.request);
                Way::Result(gathered.scatter(Reply::parse(&reply).unwrap(), &memory).unwrap())
            }
            Err(GatherError::GoHome(_)) => Way::Home,
            Err(GatherError::TooBig(mut transfer)) => loop {
                match transfer.next(&memory) {
                    Step::Done(ret) => return Way::Result(ret),
                    Step::GoHome(_) => return Way::Home,
                    Step::Call(request) => {
                        let reply = self.answer(&request.clone());
                        transfer.reply(Reply::parse(&reply).unwrap(), &memory).unwrap();
                    }
                }
            },
        }
    }
}

fn map(len: usize, prot: i32) -> u64 {
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

/// Memory of the guest that a call may use.
struct Region {
    start: u64,
    len: usize,
    next: Cell<u64>,
}

impl Region {
    fn new(len: usize) -> Region {
        let start = map(len, libc::PROT_READ | libc::PROT_WRITE);
        Region {
            start,
            len,
            next: Cell::new(start),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the mapping is this long and stays, and no reference into it exists.
        unsafe { std::slice::from_raw_parts(self.start as *const u8, self.len) }.to_vec()
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: as above; the range has just been checked.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.start as *mut u8).add(offset), bytes.len())
        };
    }

    fn clear(&self) {
        self.write(0, &vec![0; self.len]);
        self.next.set(self.start);
    }

    /// Room for `len` bytes.
    fn room(&self, len: u64) -> u64 {
        let at = self.next.get();
        self.next.set((at + len).next_multiple_of(16));
        assert!(self.next.get() <= self.start + self.len as u64);
        at
    }

    fn put(&self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len() as u64);
        self.write((at - self.start) as usize, bytes);
        at
    }

    fn words(&self, words: &[u64]) -> u64 {
        self.put(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())
    }
}

/// Makes the calls that `calls` lists natively and forwarded, each on a fresh state, and compares all that they return
/// and leave in memory. `prepare` lays out the memory and makes the state, and must do the same each time.
fn compare(prepare: impl Fn(&Region) -> Vec<(u32, [u64; 6])>) {
    let region = Region::new(2 << 20);
    let slot = Slot::new();
    let mut outcomes = Vec::new();
    for forwarded in [false, true] {
        region.clear();
        let results: Vec<i64> = prepare(&region)
            .into_iter()
            .map(|(nr, args)| {
                if !forwarded {
                    return native(nr, args);
                }
                match slot.forwarded(nr, args) {
                    Way::Result(ret) => ret,
                    Way::Home => panic!("call {nr} goes home"),
                }
            })
            .collect();
        outcomes.push((results, region.bytes()));
    }
    assert_eq!(outcomes[0].0, outcomes[1].0, "results");
    let differs = outcomes[0].1.iter().zip(&outcomes[1].1).position(|(a, b)| a != b);
    assert_eq!(differs, None, "memory, at this offset");
}

fn temp_file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn fd(file: &impl AsRawFd) -> u64 {
    file.as_raw_fd() as u64
}

#[test]
fn metadata_and_paths() {
    let dir = tempfile::tempdir().unwrap();
    for link in ["link", "read link"] {
        std::os::unix::fs::symlink("/some/where", dir.path().join(link)).unwrap();
    }
    for file in ["file", "changed"] {
        std::fs::write(dir.path().join(file), b"content").unwrap();
    }
    let name = |leaf: &str| format!("{}\0", dir.path().join(leaf).display()).into_bytes();
    let at = u64::from(libc::AT_FDCWD as u32);
    compare(|r| {
        let (file, link, none) = (r.put(&name("file")), r.put(&name("link")), r.put(&name("none")));
        // Looking at the time stamps of what is read or changed here would tell the two runs apart.
        let (read, changed) = (r.put(&name("read link")), r.put(&name("changed")));
        let (attribute, empty) = (r.put(b"user.test\0"), r.put(b"\0"));
        let opened = (
            File::open(dir.path()).unwrap(),
            File::open(dir.path().join("file")).unwrap(),
        );
        let (listed, opened_file) = (fd(&opened.0), fd(&opened.1));
        std::mem::forget(opened);
        vec![
            (4, [file, r.room(144), 0, 0, 0, 0]),
            (4, [none, r.room(144), 0, 0, 0, 0]),
            (6, [link, r.room(144), 0, 0, 0, 0]),
            (262, [at, file, r.room(144), 0, 0, 0]),
            (262, [opened_file, empty, r.room(144), 0x1000, 0, 0]),
            (332, [at, file, 0, 0x7ff, r.room(256), 0]),
            (137, [r.put(b"/proc\0"), r.room(120), 0, 0, 0, 0]),
            (89, [read, r.room(64), 64, 0, 0, 0]),
            (89, [read, r.room(64), 4, 0, 0, 0]),
            (267, [at, read, r.room(64), 64, 0, 0]),
            (89, [file, r.room(64), 64, 0, 0, 0]),
            (79, [r.room(4096), 4096, 0, 0, 0, 0]),
            (79, [r.room(16), 2, 0, 0, 0, 0]),
            (188, [changed, attribute, r.put(b"value"), 5, 0, 0]),
            (191, [changed, attribute, r.room(64), 64, 0, 0]),
            (191, [changed, attribute, r.room(64), 0, 0, 0]),
            (191, [changed, attribute, r.room(64), 2, 0, 0]),
            (194, [changed, r.room(256), 256, 0, 0, 0]),
            (197, [changed, attribute, 0, 0, 0, 0]),
            (269, [at, none, 0, 0, 0, 0]),
            (217, [listed, r.room(4096), 4096, 0, 0, 0]),
            (217, [listed, r.room(4096), 4096, 0, 0, 0]),
            (
                303,
                [
                    at,
                    file,
                    r.words(&[128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                    r.room(4),
                    0,
                    0,
                ],
            ),
            (303, [at, file, r.words(&[0, 0]), r.room(4), 0, 0]),
            (280, [at, changed, r.words(&[1, 2, 3, 4]), 0, 0, 0]),
            (3, [listed, 0, 0, 0, 0, 0]),
            (3, [opened_file, 0, 0, 0, 0, 0]),
        ]
    });
}

#[test]
fn what_the_machine_and_the_process_are() {
    compare(|r| {
        vec![
            (63, [r.room(390), 0, 0, 0, 0, 0]),
            (97, [7, r.room(16), 0, 0, 0, 0]),
            (302, [0, 7, 0, r.room(16), 0, 0]),
            (118, [r.room(4), r.room(4), r.room(4), 0, 0, 0]),
            (120, [r.room(4), r.room(4), r.room(4), 0, 0, 0]),
            (115, [64, r.room(256), 0, 0, 0, 0]),
            (115, [0, 0, 0, 0, 0, 0]),
            (125, [r.words(&[0x2008_0522]), r.room(24), 0, 0, 0, 0]),
            (125, [r.words(&[0x1998_0330]), r.room(12), 0, 0, 0, 0]),
            (125, [r.words(&[0]), 0, 0, 0, 0, 0]),
            (125, [r.words(&[7]), r.room(24), 0, 0, 0, 0]),
            (143, [0, r.room(4), 0, 0, 0, 0]),
            (148, [0, r.room(16), 0, 0, 0, 0]),
            (315, [0, r.room(128), 128, 0, 0, 0]),
            (315, [0, r.room(128), 48, 0, 0, 0]),
            (229, [2, r.room(16), 0, 0, 0, 0]),
            (36, [0, r.room(32), 0, 0, 0, 0]),
            (157, [16, r.room(16), 0, 0, 0, 0]),
            (157, [2, r.room(4), 0, 0, 0, 0]),
            (157, [23, 5, 0, 0, 0, 0]),
            (157, [38, 0, 0, 0, 0, 0]),
            (157, [39, 0, 0, 0, 0, 0]),
            (157, [39, 0, 0, 1, 0, 0]),
            (61, [u64::MAX, r.room(4), 1, r.room(144), 0, 0]),
            (247, [0, 0, r.put(&[7; 128]), 5, r.put(&[7; 144]), 0]),
        ]
    });
}

#[test]
fn bodies_vectors_and_offsets() {
    let content: Vec<u8> = (0..1_000_000u32).map(|i| (i * 7 + i / 1000) as u8).collect();
    compare(|r| {
        let file = temp_file(&content);
        let copy = temp_file(b"");
        let (f, c) = (fd(&file), fd(&copy));
        std::mem::forget((file, copy));
        let body = r.put(&[9; 3000]);
        vec![
            (8, [f, 0, 0, 0, 0, 0]),
            (0, [f, r.room(1000), 1000, 0, 0, 0]),
            (17, [f, r.room(5000), 5000, 12345, 0, 0]),
            (17, [f, r.room(1000), 1000, 999_900, 0, 0]),
            (0, [f, r.room(600_000), 600_000, 0, 0, 0]),
            (0, [f, r.room(600_000), 600_000, 0, 0, 0]),
            (19, [f, r.words(&[r.room(10), 10, r.room(300), 300]), 2, 0, 0, 0]),
            (
                295,
                [
                    f,
                    r.words(&[r.room(10), 10, 0, 0, r.room(300), 300]),
                    3,
                    777,
                    0,
                    0,
                ],
            ),
            (
                327,
                [
                    f,
                    r.words(&[r.room(10), 10, r.room(300), 300]),
                    2,
                    u64::MAX,
                    u64::MAX,
                    0,
                ],
            ),
            (1, [c, body, 3000, 0, 0, 0]),
            (18, [c, body, 100, 5000, 0, 0]),
            (20, [c, r.words(&[body, 10, body, 0, body + 50, 300]), 3, 0, 0, 0]),
            (296, [c, r.words(&[body, 10, body + 50, 300]), 2, 40, 0, 0]),
            (40, [c, f, r.words(&[100]), 5000, 0, 0]),
            (326, [f, r.words(&[100]), c, r.words(&[7]), 500, 0]),
            (17, [c, r.room(9000), 9000, 0, 0, 0]),
            (1, [c, body, u64::MAX, 0, 0, 0]),
            (0, [f, body, i64::MAX as u64, 0, 0, 0]),
            (20, [c, r.words(&[body, u64::MAX]), 1, 0, 0, 0]),
            (20, [c, r.words(&[body, 1]), 1025, 0, 0, 0]),
            (20, [c, r.words(&[body, 1]), u64::MAX, 0, 0, 0]),
            (72, [c, 5, r.words(&[1, 0, 0, 0]), 0, 0, 0]),
            (72, [c, 6, r.words(&[1, 10, 20, 0]), 0, 0, 0]),
            (72, [c, 37, r.words(&[1, 10, 20, 0]), 0, 0, 0]),
            (72, [c, 16, r.room(8), 0, 0, 0]),
            (72, [c, 1024, 2, 0, 0, 0]),
            (16, [f, 0x541b, r.room(4), 0, 0, 0]),
            (16, [f, 0x5401, r.room(36), 0, 0, 0]),
            (16, [c, 2, r.room(4), 0, 0, 0]),
            (3, [f, 0, 0, 0, 0, 0]),
            (3, [c, 0, 0, 0, 0, 0]),
        ]
    });
}

#[test]
fn large_bodies_through_a_pipe() {
    // The reader takes what comes; the writer must find its whole body written.
    let slot = Slot::new();
    let region = Region::new(2 << 20);
    let body: Vec<u8> = (0..region.len).map(|i| (i * 31 + i / 4096) as u8).collect();
    region.write(0, &body);
    let (reader, writer) = std::io::pipe().unwrap();
    let taken = std::thread::spawn(move || {
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut { reader }, &mut all).unwrap();
        all
    });
    let way = slot.forwarded(1, [fd(&writer), region.start, 1_500_000, 0, 0, 0]);
    drop(writer);
    assert_eq!(way, Way::Result(1_500_000));
    assert!(taken.join().unwrap() == body[..1_500_000]);
}

#[test]
fn sockets_and_messages() {
    compare(|r| {
        let (left, right) = UnixStream::pair().unwrap();
        let datagrams = std::os::unix::net::UnixDatagram::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let (a, b, d0, d1, l, c) = (
            fd(&left),
            fd(&right),
            fd(&datagrams.0),
            fd(&datagrams.1),
            fd(&listener),
            fd(&client),
        );
        std::mem::forget((left, right, datagrams, listener, client));
        let text = r.put(b"some text to send");
        // SCM_RIGHTS with the descriptor of the other end.
        let rights = r.words(&[20, 1 | 1 << 32, b]);
        let send = r.words(&[0, 0, r.words(&[text, 4, text + 5, 4]), 2, rights, 24, 0]);
        let receive = r.words(&[
            r.room(128),
            128,
            r.words(&[r.room(3), 3, r.room(64), 64]),
            2,
            0,
            0,
            0,
        ]);
        let short = r.words(&[0, 0, r.words(&[r.room(2), 2]), 1, r.room(64), 8, 0]);
        let many = |r: &Region| {
            let one = |r: &Region| [0, 0, r.words(&[r.put(b"datagram"), 8]), 1, 0, 0, 0, 0];
            let words = [one(r), one(r), one(r)].concat();
            r.words(&words)
        };
        vec![
            (46, [a, send, 0, 0, 0, 0]),
            (47, [b, receive, 0, 0, 0, 0]),
            (44, [a, text, 8, 0, 0, 0]),
            (45, [b, r.room(16), 16, 0, r.room(128), r.words(&[128])]),
            (45, [b, r.room(16), 16, 0x40, 0, 0]),
            (46, [a, send, 0x4000, 0, 0, 0]),
            (47, [b, short, 0x40, 0, 0, 0]),
            (307, [d0, many(r), 3, 0, 0, 0]),
            (299, [d1, many(r), 3, 0x40, 0, 0]),
            (299, [d1, many(r), 3, 0x40, 0, 0]),
            (51, [a, r.room(128), r.words(&[128]), 0, 0, 0]),
            (52, [a, r.room(128), r.words(&[1]), 0, 0, 0]),
            (52, [a, r.room(128), r.words(&[0xffff_ffff]), 0, 0, 0]),
            (54, [a, 1, 16, r.words(&[1]), 4, 0]),
            (54, [a, 1, 16, r.words(&[1]), 1, 0]),
            (55, [a, 1, 17, r.room(12), r.words(&[12]), 0]),
            (55, [a, 1, 3, r.room(12), r.words(&[12]), 0]),
            (55, [a, 1, 59, r.room(12), r.words(&[0]), 0]),
            (55, [c, 6, 13, r.room(16), r.words(&[16]), 0]),
            (55, [c, 6, 1, r.room(4), r.words(&[2]), 0]),
            (55, [c, 0, 2, r.room(4), r.words(&[4]), 0]),
            (54, [c, 0, 2, r.words(&[64]), 1, 0]),
            (50, [l, 5, 0, 0, 0, 0]),
            (48, [a, 1, 0, 0, 0, 0]),
            (47, [b, receive, 0, 0, 0, 0]),
            (49, [a, r.put(&[1, 0, b'x']), 500, 0, 0, 0]),
            (42, [a, r.put(&[1, 0, b'x', 0]), 4, 0, 0, 0]),
            (3, [a, 0, 0, 0, 0, 0]),
            (3, [b, 0, 0, 0, 0, 0]),
            (3, [d0, 0, 0, 0, 0, 0]),
            (3, [d1, 0, 0, 0, 0, 0]),
            (3, [c, 0, 0, 0, 0, 0]),
            (3, [l, 0, 0, 0, 0, 0]),
        ]
    });
}

#[test]
fn waiting_for_descriptors() {
    compare(|r| {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"x").unwrap();
        let (rd, wr) = (fd(&reader), fd(&writer));
        std::mem::forget((reader, writer));
        let epoll = native(291, [0; 6]) as u64;
        let pollfd = |f: u64, events: u64| f | events << 32;
        let set = |f: u64| {
            let mut words = [0u64; 16];
            words[f as usize / 64] |= 1 << (f % 64);
            words
        };
        vec![
            (
                7,
                [
                    r.words(&[pollfd(rd, 1), pollfd(wr, 4), pollfd(0xffff_ffff, 1)]),
                    3,
                    0,
                    0,
                    0,
                    0,
                ],
            ),
            (7, [r.words(&[pollfd(wr, 1)]), 1, 0, 0, 0, 0]),
            (7, [0, 0, 0, 0, 0, 0]),
            (
                271,
                [
                    r.words(&[pollfd(rd, 1)]),
                    1,
                    r.words(&[0, 0]),
                    r.words(&[0]),
                    8,
                    0,
                ],
            ),
            (
                271,
                [
                    r.words(&[pollfd(rd, 1)]),
                    1,
                    r.words(&[0, 0]),
                    r.words(&[0]),
                    4,
                    0,
                ],
            ),
            (
                23,
                [
                    rd + 1,
                    r.words(&set(rd)),
                    r.words(&set(rd)),
                    0,
                    r.words(&[0, 0]),
                    0,
                ],
            ),
            (23, [0xffff_ffff, 0, 0, 0, r.words(&[0, 0]), 0]),
            (
                270,
                [
                    wr + 1,
                    r.words(&set(rd)),
                    r.words(&set(wr)),
                    0,
                    r.words(&[0, 0]),
                    r.words(&[r.words(&[0]), 8]),
                ],
            ),
            (
                270,
                [wr + 1, 0, 0, 0, r.words(&[0, 0]), r.words(&[r.words(&[0]), 4])],
            ),
            (270, [wr + 1, 0, 0, 0, r.words(&[0, u64::MAX]), 0]),
            (
                233,
                [epoll, 1, rd, r.put(&[1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), 0, 0],
            ),
            (
                233,
                [epoll, 1, rd, r.put(&[1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), 0, 0],
            ),
            (233, [epoll, 2, wr, 0, 0, 0]),
            (232, [epoll, r.room(120), 10, 0, 0, 0]),
            (232, [epoll, r.room(120), 0, 0, 0, 0]),
            (232, [epoll, r.room(120), u64::MAX, 0, 0, 0]),
            (281, [epoll, r.room(120), 10, 0, r.words(&[0]), 8]),
            (441, [epoll, r.room(120), 10, r.words(&[0, 0]), 0, 0]),
            (3, [epoll, 0, 0, 0, 0, 0]),
            (3, [rd, 0, 0, 0, 0, 0]),
            (3, [wr, 0, 0, 0, 0, 0]),
        ]
    });
}

/// Descriptors for the calls of the fault test, which must neither block nor do harm.
fn candidates() -> (Vec<u64>, Vec<OwnedFd>) {
    let file = temp_file(&[5; 8192]);
    let (left, right) = UnixStream::pair().unwrap();
    left.set_nonblocking(true).unwrap();
    (&right).write_all(b"something to read").unwrap();
    let dir = File::open("/proc/self/fd").unwrap();
    let owned: Vec<OwnedFd> = vec![file.into(), left.into(), right.into(), dir.into()];
    (vec![u64::MAX, fd(&owned[0]), fd(&owned[1]), fd(&owned[3])], owned)
}

/// Pointers that a guest may give.
fn pointers(region: &Region) -> Vec<(&'static str, u64)> {
    // Far from where the kernel places mappings by itself.
    let gone = 0x2000_0000_0000;
    assert!(
        ProcessMemory::new(std::process::id() as i32)
            .area_at(gone)
            .is_none_or(|area| area.start > gone + (1 << 30))
    );
    let last = map(8192, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the second page of the mapping just made.
    let closed = unsafe { libc::mprotect((last + 4096) as *mut libc::c_void, 4096, libc::PROT_NONE) };
    assert_eq!(closed, 0);
    vec![
        ("good", region.start),
        ("null", 0),
        ("one", 1),
        ("unmapped", gone),
        ("no access", map(8192, libc::PROT_NONE)),
        ("read-only", map(1 << 20, libc::PROT_READ)),
        ("kernel's", 0xffff_8000_0000_0000),
        ("last", u64::MAX),
        ("above", 0x7fff_ffff_f000),
        ("end of a page", last + 4096 - 3),
    ]
}

/// Whether the test makes this call at all. The test may run as root: nothing here may change the machine.
fn harmless(row: &Row) -> bool {
    // A pointer that is bad to write to may be a good one to read from, so that an input would take effect: these would
    // change the machine, or the test's own process.
    let by_name = [
        "adjtimex",
        "capset",
        "chroot",
        "clock_adjtime",
        "clock_settime",
        "mknod",
        "mknodat",
        "mq_getsetattr",
        "mq_notify",
        "mq_open",
        "mq_unlink",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "setdomainname",
        "setgroups",
        "sethostname",
        "setitimer",
        "settimeofday",
        "syslog",
        "timer_create",
        "timer_settime",
        "timerfd_settime",
    ];
    let by_kind = match row.disposition {
        Disposition::Forward => true,
        Disposition::Split(kind) => {
            matches!(
                kind,
                SplitKind::Open | SplitKind::Readlink | SplitKind::TempMask | SplitKind::Times
            )
        }
        Disposition::Local | Disposition::GoHome(_) => false,
    };
    by_kind && !by_name.contains(&row.name)
}

/// Every call, every command, with every combination of good and bad pointers: the error is the native one.
#[test]
fn bad_pointers_give_the_native_error() {
    let region = Region::new(1 << 17);
    let slot = Slot::new();
    let pointers = pointers(&region);
    let (_, last) = pointers[pointers.len() - 1];
    let clear = || {
        region.clear();
        // SAFETY: the last bytes of a page that `pointers` has mapped for this.
        unsafe { std::ptr::write_bytes(last as *mut u8, 0, 3) };
    };
    let mut made = 0;
    let mut wrong = Vec::new();
    let mut try_one = |nr: u32, args: [u64; 6], what: &str| {
        let (fds, owned) = candidates();
        let _ = fds;
        clear();
        let expected = native(nr, args);
        close_new(nr, expected);
        drop(owned);
        // The same state again.
        let (_, owned) = candidates();
        clear();
        let way = slot.forwarded(nr, args);
        if let Way::Result(ret) = way {
            close_new(nr, ret);
        }
        drop(owned);
        made += 1;
        let equal = match way {
            Way::Home => true,
            Way::Result(ret) => ret == expected,
        };
        // New descriptors are numbered from the lowest free one, which is the same in both.
        if !equal {
            wrong.push(format!("{what}: native {expected}, forwarded {way:?}"));
        }
    };
    let fds = {
        let (fds, owned) = candidates();
        drop(owned);
        fds
    };
    for row in rows().filter(|row| harmless(row)) {
        for_each_signature(row, |base, name| {
            let call = resolve(row.nr, &base);
            let trims = call.sub.is_some_and(|sub| sub.name == "FITRIM");
            if !harmless_call(call.disposition) || trims {
                return;
            }
            let is_block = |i: &usize| call.kind(*i).is_some_and(|k| !matches!(k, Kind::Val(_)));
            let blocks: Vec<usize> = (0..6).filter(is_block).collect();
            let fd_args: Vec<usize> = (0..6)
                .filter(|i| matches!(call.kind(*i), Some(Kind::Val(Scalar::Fd))))
                .collect();
            for victim in &blocks {
                for (label, bad) in &pointers[1..] {
                    // What cannot be written to can still be read: not bad at all, so that the call would take effect.
                    if *label == "read-only" && only_read(call.kind(*victim)) {
                        continue;
                    }
                    // Without a timeout the call would wait.
                    if *bad == 0 && row.blocking == linklayer::syscall::Blocking::Long {
                        continue;
                    }
                    for good in [region.start, 0] {
                        if good == 0 && row.blocking == linklayer::syscall::Blocking::Long {
                            continue;
                        }
                        for descriptor in &fds[..if fd_args.is_empty() { 1 } else { fds.len() }] {
                            let mut args = base;
                            for block in &blocks {
                                args[*block] = good;
                            }
                            for arg in &fd_args {
                                args[*arg] = *descriptor;
                            }
                            args[*victim] = *bad;
                            let others = if good == 0 { "null" } else { "good" };
                            let what = format!(
                                "{name} argument {victim} {label}, others {others}, fd {}",
                                *descriptor as i64
                            );
                            try_one(row.nr, args, &what);
                        }
                    }
                }
            }
        });
    }
    assert!(made > 5000, "only {made} calls were made");
    assert!(
        wrong.is_empty(),
        "{} of {made}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Closes a descriptor that a call has made, so that the next one gets the same.
fn close_new(nr: u32, ret: i64) {
    const MEMFD_CREATE: u32 = 319;
    if nr == MEMFD_CREATE && ret >= 0 {
        native(3, [ret as u64, 0, 0, 0, 0, 0]);
    }
}

/// Whether the kernel does nothing but read the block.
fn only_read(kind: Option<Kind>) -> bool {
    match kind {
        Some(Kind::Buf(buf)) => buf.dir == Dir::In,
        Some(Kind::Iovec { dir, .. } | Kind::Msg(dir) | Kind::Mmsg { dir, .. }) => dir == Dir::In,
        Some(Kind::Str(_) | Kind::StrArray | Kind::TempMask { .. } | Kind::TempMaskPair) => true,
        _ => false,
    }
}

fn harmless_call(disposition: Disposition) -> bool {
    !matches!(
        disposition,
        Disposition::Local | Disposition::GoHome(_) | Disposition::Split(SplitKind::Prctl)
    )
}

/// The row with plausible numbers, and for a family each of its commands.
fn for_each_signature(row: &Row, mut visit: impl FnMut([u64; 6], &str)) {
    let mut base = [0u64; 6];
    let mut table = None;
    for (i, arg) in row.args.iter().enumerate() {
        base[i] = match arg.kind {
            _ if arg.name == "timeout" || arg.name.contains("flags") => 0,
            Kind::Val(Scalar::Size) if arg.name == "sigsetsize" => 8,
            Kind::Val(Scalar::Size | Scalar::Int | Scalar::Uint) if is_length(arg.name) => 16,
            // No object of anybody else's.
            Kind::Val(Scalar::Pid) => 0,
            Kind::Val(Scalar::Int) if arg.name.ends_with("id") => 0x7fff_fff1,
            Kind::Val(_) => 1,
            Kind::Sub(sub) => {
                table = Some(sub);
                0
            }
            _ => 0,
        };
    }
    let Some(table) = table else {
        return visit(base, row.name);
    };
    for sub in table.rows() {
        let mut args = base;
        for cmp in table.cmps(sub) {
            args[usize::from(cmp.arg)] = cmp.value;
        }
        let first = row.args.len() - 1;
        for (i, arg) in sub.args.iter().enumerate() {
            args[first + i] = if is_length(arg.name) { 16 } else { 0 };
        }
        visit(args, &format!("{} {}", row.name, sub.name));
    }
}

fn is_length(name: &str) -> bool {
    ["count", "size", "len", "bufsiz", "addrlen", "optlen", "msgsz"].contains(&name)
}

#[test]
fn the_hole_is_a_hole() {
    let memory = ProcessMemory::new(std::process::id() as i32);
    assert!(
        memory
            .area_at(HOLE)
            .is_none_or(|area| area.start >= HOLE + 0x1_0000)
    );
}
