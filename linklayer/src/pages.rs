//! Pages of memory on their way: how they are written into frames, and how they are kept until their process is built.
//!
//! A frame of [`Kind::Pages`] is an address (u64, little-endian) and the bytes. One of [`Kind::PackedPages`] is an address, a
//! length (u32), and the bytes as an lz4 block; no bytes at all mean zeros. One of [`Kind::KnownPages`] is an address and the hashes of
//! pages that the receiver has (see [`known`]).

pub mod known;
mod landed;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::OnceLock;

use thiserror::Error;

use crate::image::{PAGE, USER_END};
use crate::wire::{Kind, PageCounts};
use known::{Finder, Known, Source};
pub use landed::{Landed, Place};

/// Most bytes of memory in one frame.
pub const CHUNK_BYTES: usize = 256 << 10;
/// How many chunks are sent as they are after one that did not shrink.
const RAW_IN_A_ROW: u32 = 15;
/// A chunk is sent compressed when that takes away at least an eighth.
const WORTH_DIVISOR: usize = 8;

/// A frame that is none, or pages that are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PagesError {
    /// Too short, too long, outside user space, or no lz4 block of that length.
    #[error("malformed pages")]
    Malformed,
    /// More than a process may bring.
    #[error("more pages than a process may bring")]
    TooMany,
    /// They cannot be put into the process that is being built.
    #[error("the process that is being built takes no pages")]
    Gone,
}

/// Some memory as it came.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Where it belongs.
    pub address: u64,
    /// What is to be there.
    pub data: Cow<'a, [u8]>,
}

/// Reads a frame. Its addresses are in user space.
///
/// # Errors
/// [`PagesError::Malformed`].
pub fn decode(kind: Kind, payload: &[u8]) -> Result<Piece<'_>, PagesError> {
    let (address, rest) = payload.split_first_chunk::<8>().ok_or(PagesError::Malformed)?;
    let address = u64::from_le_bytes(*address);
    let data = if kind == Kind::PackedPages {
        let (len, block) = rest.split_first_chunk::<4>().ok_or(PagesError::Malformed)?;
        let len = u32::from_le_bytes(*len) as usize;
        if len > CHUNK_BYTES {
            return Err(PagesError::Malformed);
        }
        let mut data = vec![0; len];
        if !block.is_empty() {
            let got = lz4_flex::block::decompress_into(block, &mut data);
            if got.ok() != Some(len) {
                return Err(PagesError::Malformed);
            }
        }
        Cow::Owned(data)
    } else {
        Cow::Borrowed(rest)
    };
    let end = address.checked_add(data.len() as u64);
    if data.len() > CHUNK_BYTES || end.is_none_or(|end| end > USER_END) {
        return Err(PagesError::Malformed);
    }
    Ok(Piece { address, data })
}

/// Writes memory into frames: zeros as marks, what the receiver knows as hashes, the rest compressed where that pays.
#[derive(Debug, Default)]
pub struct Writer {
    /// What was written so far.
    pub counts: PageCounts,
    known: Finder,
    /// Chunks that are still sent as they are.
    raw: u32,
    packed: Vec<u8>,
}

impl Writer {
    /// The receiver says that it has these pages.
    pub fn knows(&mut self, known: Known) {
        self.known = Finder::new(known);
    }

    /// The receiver had not all that went as hashes: these pages are to be written again, and from now on all go as they are.
    pub fn was_missing(&mut self, runs: &[(u64, u64)]) {
        let pages = runs.iter().map(|(start, end)| end.saturating_sub(*start) / PAGE);
        let pages = pages.sum::<u64>().min(self.counts.stored);
        self.counts.stored -= pages;
        self.counts.saved_bytes -= pages * PAGE;
        self.known = Finder::default();
    }

    /// Writes whole pages, at most [`CHUNK_BYTES`] of them, and gives the frames to `sink`.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn write<E>(
        &mut self,
        address: u64,
        data: &[u8],
        sink: &mut impl FnMut(Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let page = PAGE as usize;
        let zero = |at: usize| {
            data.get(at..(at + page).min(data.len()))
                .is_some_and(|p| p.iter().all(|b| *b == 0))
        };
        let mut at = 0;
        while at < data.len() {
            let kind = zero(at);
            let mut end = at + page;
            while end < data.len() && zero(end) == kind {
                end += page;
            }
            let end = end.min(data.len());
            let pages = ((end - at).div_ceil(page)) as u64;
            self.counts.pages += pages;
            let to = (address + at as u64).to_le_bytes();
            if kind {
                self.counts.zero += pages;
                self.counts.bytes += 12;
                sink(Kind::PackedPages, &[&to, &((end - at) as u32).to_le_bytes()])?;
            } else {
                self.write_content(address + at as u64, &data[at..end], sink)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Writes pages that are not zeros.
    fn write_content<E>(
        &mut self,
        address: u64,
        data: &[u8],
        sink: &mut impl FnMut(Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        for run in self.known.find(data).chunk_by(|a, b| a.is_some() == b.is_some()) {
            let to = (address + at as u64).to_le_bytes();
            let end = (at + run.len() * PAGE as usize).min(data.len());
            let pages = run.len() as u64;
            if run.iter().all(Option::is_some) {
                let hashes: Vec<u8> = run.iter().flatten().flatten().copied().collect();
                self.counts.stored += pages;
                self.counts.saved_bytes += pages * PAGE;
                self.counts.bytes += 8 + hashes.len() as u64;
                sink(Kind::KnownPages, &[&to, &hashes])?;
            } else {
                self.write_run(&to, &data[at..end], pages, sink)?;
            }
            at = end;
        }
        Ok(())
    }

    fn write_run<E>(
        &mut self,
        to: &[u8; 8],
        run: &[u8],
        pages: u64,
        sink: &mut impl FnMut(Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.raw > 0 {
            self.raw -= 1;
        } else {
            self.packed
                .resize(lz4_flex::block::get_maximum_output_size(run.len()), 0);
            let len = lz4_flex::block::compress_into(run, &mut self.packed).unwrap_or(run.len());
            if len + run.len() / WORTH_DIVISOR <= run.len() {
                self.counts.compressed += pages;
                self.counts.bytes += 12 + len as u64;
                let original = (run.len() as u32).to_le_bytes();
                return sink(Kind::PackedPages, &[to, &original, &self.packed[..len]]);
            }
            self.raw = RAW_IN_A_ROW;
        }
        self.counts.bytes += 8 + run.len() as u64;
        sink(Kind::Pages, &[to, run])
    }
}

/// Bytes of memory that are kept in one piece.
const BLOCK: u64 = CHUNK_BYTES as u64;

struct Block {
    data: Vec<u8>,
    /// Which of its pages are there, bit by bit.
    pages: u64,
}

/// Most bytes of pages that are kept for one process: this machine's memory. What is more could not run here.
pub fn most_kept_bytes() -> usize {
    /// Where the kernel does not tell.
    const OTHERWISE: usize = 8 << 30;
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        total_bytes(&text).unwrap_or(OTHERWISE)
    })
}

/// MemTotal of proc_meminfo(5), which is in units of 1024 bytes.
fn total_bytes(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.split_whitespace()
        .next()?
        .parse::<usize>()
        .ok()?
        .checked_mul(1024)
}

/// Pages of a process that is not built yet. What comes later replaces what came before. What has a [`Place`] already is put there
/// as it comes, and the rest is kept.
#[derive(Default)]
pub struct Kept {
    blocks: BTreeMap<u64, Block>,
    bytes: usize,
    place: Option<Box<dyn Place>>,
    landed: Landed,
    /// Pages that came as hashes and were not there.
    missing: BTreeSet<u64>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Kept {
    /// Bytes that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// From now on pages are put there as they come. To be said before the first one has come.
    pub fn put_into(&mut self, place: Box<dyn Place>) {
        self.place = Some(place);
    }

    /// Which pages were put into the place.
    pub fn landed(&self) -> &Landed {
        &self.landed
    }

    /// Nothing is put into the place any more, which may be gone.
    pub fn leave_place(&mut self) {
        self.place = None;
    }

    /// Bytes that are kept, have been put, or are still to come for a hash.
    fn all_bytes(&self) -> usize {
        self.bytes + self.landed.bytes() + self.missing.len() * PAGE as usize
    }

    /// Takes up a frame of pages, of which at most `limit` bytes may be there. What comes as a hash is had from `source`.
    ///
    /// # Errors
    /// [`PagesError`].
    pub fn take(
        &mut self,
        kind: Kind,
        payload: &[u8],
        source: &dyn Source,
        limit: usize,
    ) -> Result<(), PagesError> {
        if kind != Kind::KnownPages {
            return self.put(&decode(kind, payload)?, limit);
        }
        let (mut address, hashes) = known::decode(payload)?;
        let mut page = [0; PAGE as usize];
        for hash in hashes {
            if source.page(hash, &mut page) {
                let data = Cow::Borrowed(&page[..]);
                self.put(&Piece { address, data }, limit)?;
            } else {
                self.lack(address, limit)?;
            }
            address += PAGE;
        }
        Ok(())
    }

    /// A page is not there; what came before is not what it is.
    fn lack(&mut self, address: u64, limit: usize) -> Result<(), PagesError> {
        if let Some(block) = self.blocks.get_mut(&(address / BLOCK)) {
            let bit = 1 << ((address % BLOCK) / PAGE);
            if block.pages & bit != 0 {
                block.pages &= !bit;
                self.bytes -= PAGE as usize;
            }
        }
        self.missing.insert(address);
        if self.all_bytes() > limit {
            return Err(PagesError::TooMany);
        }
        Ok(())
    }

    /// Pages that came as hashes and have to be sent as they are: their runs, at most so many.
    pub fn missing(&self, most: usize) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for at in &self.missing {
            let full = runs.len() == most;
            match runs.last_mut() {
                Some((_, end)) if end == at => *end += PAGE,
                _ if full => break,
                _ => runs.push((*at, at + PAGE)),
            }
        }
        runs
    }

    /// Takes whole pages, of which at most `limit` bytes may be there.
    ///
    /// # Errors
    /// [`PagesError`].
    pub fn put(&mut self, piece: &Piece<'_>, limit: usize) -> Result<(), PagesError> {
        if !piece.address.is_multiple_of(PAGE) || !(piece.data.len() as u64).is_multiple_of(PAGE) {
            return Err(PagesError::Malformed);
        }
        let (mut at, mut rest) = (piece.address, &*piece.data);
        while !rest.is_empty() {
            let end = self.place.as_ref().and_then(|place| place.end_of(at));
            let len = end.map_or(PAGE, |end| (end - at).min(rest.len() as u64));
            let (data, after) = rest.split_at(len as usize);
            match &self.place {
                Some(place) if end.is_some() => {
                    self.landed.add(at..at + len);
                    if self.all_bytes() > limit {
                        return Err(PagesError::TooMany);
                    }
                    place.put(at, data).map_err(|_| PagesError::Gone)?;
                }
                _ => self.keep(at, data, limit)?,
            }
            if !self.missing.is_empty() {
                for page in (at..at + len).step_by(PAGE as usize) {
                    self.missing.remove(&page);
                }
            }
            (at, rest) = (at + len, after);
        }
        Ok(())
    }

    /// Keeps a page.
    fn keep(&mut self, at: u64, page: &[u8], limit: usize) -> Result<(), PagesError> {
        let block = self.blocks.entry(at / BLOCK).or_insert_with(|| Block {
            data: vec![0; BLOCK as usize],
            pages: 0,
        });
        let number = (at % BLOCK) / PAGE;
        let start = (at % BLOCK) as usize;
        block.data[start..start + PAGE as usize].copy_from_slice(page);
        if block.pages >> number & 1 == 0 {
            block.pages |= 1 << number;
            self.bytes += PAGE as usize;
            if self.all_bytes() > limit {
                return Err(PagesError::TooMany);
            }
        }
        Ok(())
    }

    /// Drops the pages outside of these runs, which are in the order of addresses.
    pub fn retain(&mut self, runs: &[(u64, u64)]) {
        let mut rest = runs.iter().peekable();
        let mut bytes = 0;
        self.blocks.retain(|number, block| {
            for page in 0..BLOCK / PAGE {
                let at = number * BLOCK + page * PAGE;
                while rest.next_if(|(_, end)| *end <= at).is_some() {}
                if rest.peek().is_none_or(|(start, _)| *start > at) {
                    block.pages &= !(1 << page);
                }
            }
            bytes += block.pages.count_ones() as usize * PAGE as usize;
            block.pages != 0
        });
        self.bytes = bytes;
        self.landed.retain(runs);
        let within = |at: &u64| {
            let after = runs.partition_point(|(start, _)| start <= at);
            after > 0 && runs[after - 1].1 > *at
        };
        self.missing.retain(within);
    }

    /// What is kept, in the order of addresses.
    pub fn runs(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.blocks.iter().flat_map(|(number, block)| {
            present(block.pages).map(move |pages| {
                let bytes = (pages.start * PAGE) as usize..(pages.end * PAGE) as usize;
                (number * BLOCK + pages.start * PAGE, &block.data[bytes])
            })
        })
    }
}

/// The runs of ones in a word.
fn present(word: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0u32;
    std::iter::from_fn(move || {
        let rest = word.checked_shr(at)?;
        if rest == 0 {
            return None;
        }
        let start = at + rest.trailing_zeros();
        let end = start + (word >> start).trailing_ones();
        at = end;
        Some(u64::from(start)..u64::from(end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_bring_as_much_as_the_machine_has() {
        assert_eq!(
            total_bytes("MemTotal:       24582508 kB\nMemFree: 1 kB\n"),
            Some(24_582_508 << 10)
        );
        assert_eq!(total_bytes("MemFree: 1 kB\n"), None);
        assert!(most_kept_bytes() > 1 << 20);
    }
    use proptest::prelude::*;

    const LIMIT: usize = 64 << 20;

    fn sent(writer: &mut Writer, address: u64, data: &[u8]) -> Vec<(Kind, Vec<u8>)> {
        let mut frames = Vec::new();
        let done: Result<(), ()> = writer.write(address, data, &mut |kind, parts| {
            frames.push((kind, parts.concat()));
            Ok(())
        });
        assert_eq!(done, Ok(()));
        frames
    }

    fn kept(frames: &[(Kind, Vec<u8>)], kept: &mut Kept) {
        for (kind, payload) in frames {
            let piece = decode(*kind, payload).unwrap();
            kept.put(&piece, LIMIT).unwrap();
        }
    }

    fn content(kept: &Kept) -> BTreeMap<u64, Vec<u8>> {
        kept.runs()
            .flat_map(|(at, data)| {
                data.chunks(PAGE as usize)
                    .enumerate()
                    .map(move |(i, page)| (at + i as u64 * PAGE, page.to_vec()))
            })
            .collect()
    }

    #[test]
    fn zeros_are_marks_and_what_shrinks_is_packed() {
        let mut writer = Writer::default();
        let page = PAGE as usize;
        let mut data = vec![0; 3 * page];
        data[page..2 * page].fill(7);
        let frames = sent(&mut writer, 0x10000, &data);
        assert_eq!(frames.len(), 3);
        assert!(frames.iter().all(|(_, payload)| payload.len() < 100));
        assert_eq!(
            (writer.counts.pages, writer.counts.zero, writer.counts.compressed),
            (3, 2, 1)
        );
        let mut store = Kept::default();
        kept(&frames, &mut store);
        assert_eq!(store.bytes(), 3 * page);
        assert_eq!(store.runs().next(), Some((0x10000, data.as_slice())));
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is() {
        let mut writer = Writer::default();
        let mut noise = vec![0; CHUNK_BYTES];
        let mut x = 1u64;
        for byte in &mut noise {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (x >> 56) as u8;
        }
        let frames = sent(&mut writer, 0, &noise);
        assert_eq!(frames[0].0, Kind::Pages);
        assert_eq!(writer.counts.bytes, 8 + CHUNK_BYTES as u64);
    }

    #[test]
    fn nonsense_is_refused() {
        let packed = |len: u32, block: &[u8]| [&0u64.to_le_bytes()[..], &len.to_le_bytes(), block].concat();
        assert!(decode(Kind::Pages, &[0; 7]).is_err());
        assert!(decode(Kind::Pages, &u64::MAX.to_le_bytes()).is_err());
        assert!(decode(Kind::PackedPages, &packed(u32::MAX, &[])).is_err());
        assert!(decode(Kind::PackedPages, &packed(4096, &[1, 2, 3])).is_err());
        let piece = Piece {
            address: 5,
            data: vec![0; PAGE as usize].into(),
        };
        assert_eq!(Kept::default().put(&piece, LIMIT), Err(PagesError::Malformed));
        let piece = Piece {
            address: 0,
            data: vec![0; 2 * PAGE as usize].into(),
        };
        assert_eq!(
            Kept::default().put(&piece, PAGE as usize),
            Err(PagesError::TooMany)
        );
    }

    /// Two pieces of memory next to each other, and what was put there.
    #[derive(Clone, Default)]
    struct Memory(std::sync::Arc<std::sync::Mutex<BTreeMap<u64, u8>>>);

    impl Place for Memory {
        fn end_of(&self, page: u64) -> Option<u64> {
            [0x10000..0x14000, 0x14000..0x20000]
                .into_iter()
                .find(|piece: &Range<u64>| piece.contains(&page))
                .map(|piece| piece.end)
        }

        fn put(&self, address: u64, data: &[u8]) -> std::io::Result<()> {
            let end = address + data.len() as u64;
            assert!(self.end_of(address).is_some_and(|piece| end <= piece));
            let mut there = self.0.lock().map_err(|_| std::io::ErrorKind::Other)?;
            for (at, page) in (address..).step_by(PAGE as usize).zip(data.chunks(PAGE as usize)) {
                there.insert(at, page[0]);
            }
            Ok(())
        }
    }

    #[test]
    fn what_has_a_place_is_put_there_and_the_rest_is_kept() {
        let memory = Memory::default();
        let mut store = Kept::default();
        store.put_into(Box::new(memory.clone()));
        let data: Vec<u8> = (0..20).flat_map(|n| vec![n; PAGE as usize]).collect();
        let piece = |address, pages: usize| Piece {
            address,
            data: data[..pages * PAGE as usize].into(),
        };
        store.put(&piece(0xf000, 20), LIMIT).unwrap();
        assert_eq!((store.bytes(), store.landed().bytes()), (4 << 12, 16 << 12));
        assert_eq!(
            store.landed().runs(&(0..1 << 30)).first(),
            Some(&(0x10000..0x20000))
        );
        assert_eq!(memory.0.lock().unwrap()[&0x1f000], 16);
        assert_eq!(
            content(&store).keys().copied().collect::<Vec<_>>(),
            [0xf000, 0x20000, 0x21000, 0x22000]
        );
        // It is one limit for both.
        let more = store.put(&piece(0x30000, 1), 20 << 12);
        assert_eq!(more, Err(PagesError::TooMany));
        // What is asked for and comes is not missing any more, wherever it goes.
        store.lack(0x11000, LIMIT).unwrap();
        assert_eq!(store.missing(9), [(0x11000, 0x12000)]);
        store.put(&piece(0x11000, 1), LIMIT).unwrap();
        assert_eq!(store.missing(9), []);
        store.retain(&[(0x12000, 0x21000)]);
        assert_eq!(store.landed().stale().first(), Some(&(0x10000..0x12000)));
        assert_eq!(store.landed().bytes(), 14 << 12);
        assert_eq!(store.bytes(), 1 << 12);
    }

    proptest! {
        #[test]
        fn the_last_word_counts_and_what_is_gone_is_gone(
            writes in prop::collection::vec((0u64..200, 1usize..70, 0u8..4), 1..20),
            runs in prop::collection::btree_set(0u64..280, 0..40),
        ) {
            let mut writer = Writer::default();
            let (mut store, mut model) = (Kept::default(), BTreeMap::new());
            for (page, count, fill) in writes {
                let count = count.min(CHUNK_BYTES / PAGE as usize);
                let data = vec![fill; count * PAGE as usize];
                kept(&sent(&mut writer, page * PAGE, &data), &mut store);
                for i in 0..count as u64 {
                    model.insert((page + i) * PAGE, vec![fill; PAGE as usize]);
                }
            }
            prop_assert_eq!(&content(&store), &model);
            let runs: Vec<(u64, u64)> = runs.into_iter().map(|p| (p * PAGE, (p + 1) * PAGE)).collect();
            store.retain(&runs);
            model.retain(|at, _| runs.iter().any(|(start, end)| (start..end).contains(&at)));
            prop_assert_eq!(&content(&store), &model);
            prop_assert_eq!(store.bytes(), model.len() * PAGE as usize);
        }

        #[test]
        fn garbage_never_panics(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(Kind::PackedPages, &payload);
            let _ = decode(Kind::Pages, &payload);
        }
    }
}
