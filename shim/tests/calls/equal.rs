//! Calls that succeed, or fail for reasons of their own: results and memory are compared.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

use super::*;

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
