//! Anonymous memory that processes share: which parts of which objects they have between them.

use std::collections::BTreeMap;
use std::io;

use linklayer::image::{AreaFlags, AreaKind, PAGE, ProcessImage};
use linklayer::wire::SharedObject;

use crate::memory::ProcessMemory;

/// Most bytes that are read at once.
const PART_BYTES: u64 = 256 << 10;

/// A part of a shared object, and where a process has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
    /// By which thread the process is reached.
    tid: i32,
    /// At which address.
    address: u64,
}

/// Takes content: id of the object, offset, bytes.
pub type Sink<'a> = dyn FnMut(u64, u64, &[u8]) -> io::Result<()> + 'a;

/// The objects of a group of stopped processes, each with all its mapped parts once.
#[derive(Debug)]
pub struct SharedObjects {
    objects: BTreeMap<u64, (SharedObject, Vec<Piece>)>,
}

impl SharedObjects {
    /// Of processes that were captured, each with a living thread by which it is reached.
    pub fn of<'a>(images: impl IntoIterator<Item = (i32, &'a ProcessImage)>) -> SharedObjects {
        let objects = pieces(images)
            .into_iter()
            .map(|(id, pieces)| {
                let size = size(&pieces);
                (id, (SharedObject { id, size }, pieces))
            })
            .collect();
        SharedObjects { objects }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Those that one process of the group maps.
    pub fn named_by(&self, image: &ProcessImage) -> Vec<SharedObject> {
        let mut ids: Vec<u64> = image.areas.iter().filter_map(|area| id(&area.kind)).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.iter()
            .filter_map(|id| Some(self.objects.get(id)?.0))
            .collect()
    }

    /// Gives all content but zeros to `sink`: id, offset, bytes.
    ///
    /// # Errors
    /// Those of reading, when a process has died, and of `sink`.
    pub fn read(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        for (object, pieces) in self.objects.values() {
            for piece in pieces {
                let memory = ProcessMemory::new(piece.tid);
                let end = (piece.offset + piece.len).min(object.size);
                let mut at = piece.offset;
                while at < end {
                    let mut data = vec![0; (end - at).min(PART_BYTES) as usize];
                    memory.read_forced(piece.address + (at - piece.offset), &mut data)?;
                    if data.iter().any(|b| *b != 0) {
                        sink(object.id, at, &data)?;
                    }
                    at += data.len() as u64;
                }
            }
        }
        Ok(())
    }
}

/// Whether an object is accounted for as a whole (without MAP_NORESERVE), as far as this process tells.
pub fn reserves(image: &ProcessImage, object: u64) -> bool {
    let mut areas = image.areas.iter().filter(|area| id(&area.kind) == Some(object));
    !areas.any(|area| area.flags.has(AreaFlags::NORESERVE))
}

fn id(kind: &AreaKind) -> Option<u64> {
    match kind {
        AreaKind::SharedAnon { id, .. } => Some(*id),
        _ => None,
    }
}

/// All mapped parts of all objects, once each and by offset.
fn pieces<'a>(images: impl IntoIterator<Item = (i32, &'a ProcessImage)>) -> BTreeMap<u64, Vec<Piece>> {
    let mut all: BTreeMap<u64, Vec<Piece>> = BTreeMap::new();
    for (tid, image) in images {
        for area in &image.areas {
            if let AreaKind::SharedAnon { id, offset, .. } = area.kind {
                all.entry(id).or_default().push(Piece {
                    offset,
                    len: area.len(),
                    tid,
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

/// The size of an object: it may be mapped farther than it reaches, and there is nothing to be read behind its end.
fn size(pieces: &[Piece]) -> u64 {
    let there = |piece: &Piece, page: u64| {
        ProcessMemory::new(piece.tid)
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

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::image::{Area, AreaFlags, Prot};

    fn image(areas: &[(u64, u64, u64, u64)]) -> ProcessImage {
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
        ProcessImage {
            areas,
            ..crate::test_image()
        }
    }

    #[test]
    fn every_part_of_an_object_is_there_once() {
        let one = image(&[(0x10000, 0x3000, 7, 0), (0x20000, 0x1000, 8, 0)]);
        let two = image(&[(0x50000, 0x4000, 7, 0x2000), (0x60000, 0x1000, 7, 0x1000)]);
        let all = pieces([(1, &one), (2, &two)]);
        let piece = |offset, len, tid, address| Piece {
            offset,
            len,
            tid,
            address,
        };
        assert_eq!(
            all[&7],
            [piece(0, 0x3000, 1, 0x10000), piece(0x3000, 0x3000, 2, 0x51000)]
        );
        assert_eq!(all[&8], [piece(0, 0x1000, 1, 0x20000)]);
    }

    #[test]
    fn an_object_ends_where_it_can_be_read_no_more() {
        let page = PAGE as usize;
        // SAFETY: a new mapping that only this test knows; the second call stretches it beyond its object.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let base = libc::mmap(std::ptr::null_mut(), 3 * page, prot, flags, -1, 0);
            libc::mremap(base, 3 * page, 7 * page, libc::MREMAP_MAYMOVE)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let own = image(&[(base as u64, 7 * PAGE, 1, 0)]);
        let objects = SharedObjects::of([(std::process::id() as i32, &own)]);
        assert_eq!(
            objects.named_by(&own),
            [SharedObject {
                id: 1,
                size: 3 * PAGE
            }]
        );
        let mut parts = 0;
        let read = objects.read(&mut |_, _, _| {
            parts += 1;
            Ok(())
        });
        assert!(read.is_ok() && parts == 0);
    }
}
