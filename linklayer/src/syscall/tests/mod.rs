//! The marshalling against a simulated guest memory and a simulated kernel at home.

mod blocks;
mod faults;
mod hostile;
mod messages;
mod transfers;

use std::cell::RefCell;

use super::*;
use crate::memory::{GuestMemory, HOLE, LocalMemory};

/// Where the simulated vessel sees the slot's data area.
const BASE: u64 = 0x1000_0000_1000;
/// Where tests map the guest's memory.
const GUEST: u64 = 0x5555_0000_0000;

/// What a simulated kernel sees: the registers, and memory at `BASE`.
struct Vessel<'a> {
    args: [u64; 6],
    data: &'a mut [u8],
    space: usize,
}

impl Vessel<'_> {
    /// The bytes behind a pointer, all of which must lie in the part of the area that the request declared.
    fn at(&mut self, addr: u64, len: usize) -> &mut [u8] {
        let offset = addr.checked_sub(BASE).expect("the pointer lies in the data area") as usize;
        assert!(offset + len <= self.space, "the block lies in the declared space");
        &mut self.data[offset..offset + len]
    }

    fn u64_at(&mut self, addr: u64) -> u64 {
        u64::from_le_bytes(self.at(addr, 8).try_into().unwrap())
    }

    fn u32_at(&mut self, addr: u64) -> u32 {
        u32::from_le_bytes(self.at(addr, 4).try_into().unwrap())
    }

    fn string(&mut self, addr: u64) -> Vec<u8> {
        let mut text = Vec::new();
        for i in 0.. {
            match self.at(addr + i, 1)[0] {
                0 => break,
                byte => text.push(byte),
            }
        }
        text
    }
}

/// Sends a gathered call over the wire, makes it, and takes the reply back over the wire.
fn make(gathered: &Gathered, mem: &dyn GuestMemory, kernel: impl FnOnce(&mut Vessel<'_>) -> i64) -> i64 {
    let reply = answer(&gathered.request, kernel);
    gathered.scatter(Reply::parse(&reply).unwrap(), mem).unwrap()
}

/// The deputy's half.
fn answer(request: &CallRequest, kernel: impl FnOnce(&mut Vessel<'_>) -> i64) -> Vec<u8> {
    let mut wire = Vec::new();
    request.encode(&mut wire);
    assert_eq!(wire.len(), request.encoded_len());
    assert_eq!(&CallRequest::decode(&wire).unwrap(), request);
    let view = CallView::parse(&wire).unwrap();
    // What an earlier call may have left in the slot.
    let data = Data::new(0xaa);
    let args = place(&view, &data, BASE);
    let mut data = data.0.into_inner();
    let space = view.space as usize;
    assert!(
        data[space..].iter().all(|&byte| byte == 0xaa),
        "nothing behind the space is touched"
    );
    let ret = kernel(&mut Vessel {
        args,
        data: &mut data,
        space,
    });
    let mut reply = Vec::new();
    collect(&view, &Data(data.into()), ret, &mut reply);
    reply
}

/// A slot's data area, of which nobody may go beyond the end.
struct Data(RefCell<Vec<u8>>);

impl Data {
    fn new(byte: u8) -> Data {
        Data(vec![byte; SLOT_DATA_LEN].into())
    }
}

impl Area for Data {
    fn write(&self, at: usize, bytes: &[u8]) {
        self.0.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.borrow()[at..at + bytes.len()]);
    }
}

/// Gathers and makes a call.
fn call(nr: u32, args: [u64; 6], mem: &dyn GuestMemory, kernel: impl FnOnce(&mut Vessel<'_>) -> i64) -> i64 {
    make(&gather(nr, &args, mem).unwrap(), mem, kernel)
}

fn memory(bytes: &[u8]) -> LocalMemory {
    let memory = LocalMemory::new();
    memory.map(GUEST, bytes.to_vec(), true);
    memory
}

/// As `memory`, in whole pages, as strings need it.
fn pages(bytes: &[u8]) -> LocalMemory {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    memory(&bytes)
}

fn peek(memory: &LocalMemory, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(addr, &mut bytes).unwrap();
    bytes
}

fn home_reason(result: Result<Gathered, GatherError>) -> HomeReason {
    match result {
        Err(GatherError::GoHome(reason)) => reason,
        other => panic!("expected to go home, got {other:?}"),
    }
}
