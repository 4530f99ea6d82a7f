use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

fn main() {
    let shared = Arc::new(Mutex::new(BTreeMap::new()));
    let threads: Vec<_> = (0..8)
        .map(|i| {
            let shared = shared.clone();
            std::thread::spawn(move || {
                for j in 0..500u64 {
                    *shared.lock().unwrap().entry(j % 10).or_insert(0) += i * j;
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    println!("{:?}", shared.lock().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        text.len()
    });
    TcpStream::connect(address).unwrap().write_all(&[b'x'; 100_000]).unwrap();
    println!("{}", server.join().unwrap());
    let out = Command::new("sh").args(["-c", "echo $0; exit 2", "child"]).output().unwrap();
    println!("{:?} {:?}", String::from_utf8_lossy(&out.stdout), out.status.code());
    let (send, receive) = mpsc::channel::<u8>();
    println!("{:?}", receive.recv_timeout(Duration::from_millis(20)));
    drop(send);
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    println!("{}", start.elapsed() >= Duration::from_millis(20));
    std::fs::create_dir("rs").unwrap();
    std::fs::write("rs/file", "content").unwrap();
    println!("{:?}", std::fs::read_dir("rs").unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>());
    let panicked = std::thread::spawn(|| panic!("on purpose")).join();
    println!("{}", panicked.is_err());
    std::process::exit(12);
}
