//! What a group of captured guests takes home with it, on its way.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use linklayer::frame::Header;
use linklayer::image::{AreaKind, PAGE, ProcessImage};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, SharedObject, Vfork};
use shim::memory::ProcessMemory;

use super::shared::{Command, Shared};

/// Most bytes of pages in one frame.
const PAGES_BYTES: usize = 256 << 10;

/// A captured guest.
pub(super) struct Member {
    pub(super) pid: i32,
    /// A thread of it, as seen here, by which its memory is reached.
    pub(super) reached_by: i32,
    /// Number of its address space.
    pub(super) space: u64,
    pub(super) image: ProcessImage,
    pub(super) reason: StayReason,
    pub(super) vforks: Vec<Vfork>,
}

/// Sends a group home on a thread of its own, and says so to the tracer.
pub(super) fn start(shared: &Arc<Shared>, first: i32, members: Vec<Member>) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("homeward", move || {
        let result = send(&shared, members).map_err(|e| format!("{e:#}"));
        shared.post(Command::WentHome(first, result));
    });
}

fn errno(answer: &[u8], what: &str) -> anyhow::Result<()> {
    let wire::Errno(errno) = wire::decode(answer)?;
    let why = nix::errno::Errno::from_raw(errno).desc();
    anyhow::ensure!(errno == 0, "{what} at home: {why}");
    Ok(())
}

fn send(shared: &Shared, members: Vec<Member>) -> anyhow::Result<()> {
    let mut group: Vec<i32> = members.iter().map(|m| m.pid).collect();
    let pieces = pieces(&members);
    let sizes: BTreeMap<u64, u64> = pieces
        .iter()
        .map(|(id, pieces)| (*id, size(&members, pieces)))
        .collect();
    let lane = group.first().copied().unwrap_or_default();
    for member in &members {
        let mut objects: Vec<SharedObject> = member
            .image
            .areas
            .iter()
            .filter_map(|area| match area.kind {
                AreaKind::SharedAnon { id, .. } => Some(SharedObject {
                    id,
                    size: sizes.get(&id).copied().unwrap_or(0),
                }),
                _ => None,
            })
            .collect();
        objects.sort_unstable_by_key(|object| object.id);
        objects.dedup();
        let body = wire::Homecoming {
            image: member.image.clone(),
            reason: member.reason.clone(),
            group: group.clone(),
            objects,
            vforks: member.vforks.clone(),
        };
        let body = wire::encode(&body);
        let answer = shared.ask(lane, member.pid, Kind::Homecoming, &body)?;
        if wire::decode::<wire::Errno>(&answer)?.0 == libc::ESRCH {
            // Killed at home; it is about to be removed here.
            group.retain(|pid| *pid != member.pid);
            continue;
        }
        errno(&answer, "layout")?;
    }
    let mut spaces = HashSet::new();
    let coming = |m: &&Member| group.contains(&m.pid);
    for member in members.iter().filter(coming).filter(|m| spaces.insert(m.space)) {
        send_pages(shared, lane, member)?;
    }
    for (id, pieces) in &pieces {
        send_object(
            shared,
            lane,
            *id,
            sizes.get(id).copied().unwrap_or(0),
            pieces,
            &members,
        )?;
    }
    let commit = wire::encode(&wire::HomeCommit { group });
    errno(&shared.ask(lane, lane, Kind::HomeCommit, &commit)?, "resuming")
}

fn send_pages(shared: &Shared, lane: i32, member: &Member) -> anyhow::Result<()> {
    let link = shared.link()?;
    let memory = ProcessMemory::new(member.reached_by);
    let private = member
        .image
        .areas
        .iter()
        .filter(|a| !a.is_kernel() && !matches!(a.kind, AreaKind::SharedAnon { .. }));
    for area in private {
        for run in shim::capture::page_runs(member.reached_by, area)? {
            let mut at = run.start;
            while at < run.end {
                let len = ((run.end - at) as usize).min(PAGES_BYTES);
                let mut data = vec![0; len];
                memory.read_forced(at, &mut data)?;
                let header = Header::new(Kind::Pages as u16, member.pid, link.next_seq());
                link.send(lane as u32, header, &[&at.to_le_bytes(), &data])?;
                at += len as u64;
            }
        }
    }
    Ok(())
}

/// A part of a shared object, and where a member has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
    /// Which member.
    member: usize,
    /// At which address.
    address: u64,
}

/// All mapped parts of all shared objects, once each and by offset.
fn pieces(members: &[Member]) -> BTreeMap<u64, Vec<Piece>> {
    let mut all: BTreeMap<u64, Vec<Piece>> = BTreeMap::new();
    for (member, captured) in members.iter().enumerate() {
        for area in &captured.image.areas {
            if let AreaKind::SharedAnon { id, offset, .. } = area.kind {
                all.entry(id).or_default().push(Piece {
                    offset,
                    len: area.len(),
                    member,
                    address: area.start,
                });
            }
        }
    }
    for pieces in all.values_mut() {
        pieces.sort_by_key(|piece| piece.offset);
        let mut covered = 0u64;
        pieces.retain_mut(|piece| {
            let known = covered.saturating_sub(piece.offset).min(piece.len);
            piece.offset += known;
            piece.address += known;
            piece.len -= known;
            covered = covered.max(piece.offset + piece.len);
            piece.len > 0
        });
    }
    all
}

fn reach(members: &[Member], piece: &Piece) -> ProcessMemory {
    ProcessMemory::new(members.get(piece.member).map_or(0, |m| m.reached_by))
}

/// The size of an object: it may be mapped farther than it reaches, and there is nothing to be read behind its end.
fn size(members: &[Member], pieces: &[Piece]) -> u64 {
    let there = |piece: &Piece, page: u64| {
        reach(members, piece)
            .read_forced(piece.address + page * PAGE, &mut [0])
            .is_ok()
    };
    for piece in pieces.iter().rev() {
        let (mut low, mut high) = (0, piece.len / PAGE);
        if high > 0 && there(piece, high - 1) {
            return piece.offset + piece.len;
        }
        // Pages below `low` are there, those from `high` on are not.
        while low < high {
            let middle = low + (high - low) / 2;
            if there(piece, middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if low > 0 {
            return piece.offset + low * PAGE;
        }
    }
    0
}

fn send_object(
    shared: &Shared,
    lane: i32,
    id: u64,
    size: u64,
    pieces: &[Piece],
    members: &[Member],
) -> anyhow::Result<()> {
    let link = shared.link()?;
    for piece in pieces {
        let memory = reach(members, piece);
        let end = (piece.offset + piece.len).min(size);
        let mut at = piece.offset;
        while at < end {
            let len = ((end - at) as usize).min(PAGES_BYTES);
            let mut data = vec![0; len];
            memory.read_forced(piece.address + (at - piece.offset), &mut data)?;
            // Home's new object is empty.
            if data.iter().any(|b| *b != 0) {
                let header = Header::new(Kind::SharedPages as u16, lane, link.next_seq());
                link.send(
                    lane as u32,
                    header,
                    &[&id.to_le_bytes(), &at.to_le_bytes(), &data],
                )?;
            }
            at += len as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::image::{Area, AreaFlags, Prot};

    fn member(areas: &[(u64, u64, u64, u64)]) -> Member {
        let areas = areas
            .iter()
            .map(|(start, len, id, offset)| Area {
                start: *start,
                end: start + len,
                prot: Prot(3),
                flags: AreaFlags(AreaFlags::SHARED),
                kind: AreaKind::SharedAnon {
                    id: *id,
                    offset: *offset,
                    sysv: false,
                },
            })
            .collect();
        Member {
            pid: 1,
            reached_by: 1,
            space: 1,
            image: ProcessImage {
                areas,
                ..ProcessImage::default()
            },
            reason: StayReason::Asked,
            vforks: Vec::new(),
        }
    }

    #[test]
    fn every_part_of_an_object_is_sent_once() {
        let members = [
            member(&[(0x10000, 0x3000, 7, 0), (0x20000, 0x1000, 8, 0)]),
            member(&[(0x50000, 0x4000, 7, 0x2000), (0x60000, 0x1000, 7, 0x1000)]),
        ];
        let all = pieces(&members);
        let piece = |offset, len, member, address| Piece {
            offset,
            len,
            member,
            address,
        };
        assert_eq!(
            all[&7],
            [piece(0, 0x3000, 0, 0x10000), piece(0x3000, 0x3000, 1, 0x51000)]
        );
        assert_eq!(all[&8], [piece(0, 0x1000, 0, 0x20000)]);
    }
}
