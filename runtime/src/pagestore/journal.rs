//! The journal of a page store: which page is in which slot, as a list of changes that every process replays.
//!
//! A record is 16 bytes: the first 8 bytes of the page's hash, the slot, what happened, and a check against torn writes. The state is
//! a function of the records, so that processes that have read as far agree, and a journal is shortened by writing down its state.

use std::collections::BTreeSet;
use std::num::NonZeroU64;

use lru::LruCache;

/// Bytes of a record.
pub const RECORD_BYTES: usize = 16;
/// Bytes in front of the records.
pub const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"mosrunps";
const VERSION: u32 = 1;

/// The beginning of a page's hash, by which its slot is found; the whole hash is never written down.
pub type Prefix = NonZeroU64;

/// The prefix of a hash.
pub fn prefix(hash: &[u8; 32]) -> Prefix {
    let mut first = [0; 8];
    first.copy_from_slice(&hash[..8]);
    NonZeroU64::new(u64::from_be_bytes(first)).unwrap_or(NonZeroU64::MIN)
}

/// What happened to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is in this slot now, and what was there is not.
    Put(Prefix, u32),
    /// It was used.
    Use(Prefix),
    /// It is not there any more.
    Drop(Prefix),
}

impl Change {
    /// As it is written down.
    pub fn encode(self) -> [u8; RECORD_BYTES] {
        let (prefix, slot, what) = match self {
            Change::Put(prefix, slot) => (prefix, slot, 1),
            Change::Use(prefix) => (prefix, 0, 2),
            Change::Drop(prefix) => (prefix, 0, 3),
        };
        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&prefix.get().to_le_bytes());
        record[8..12].copy_from_slice(&slot.to_le_bytes());
        record[12] = what;
        let check = check(&record);
        record[13..].copy_from_slice(&check);
        record
    }

    /// Reads a record; `None` when it is none.
    pub fn decode(record: &[u8]) -> Option<Change> {
        let record: &[u8; RECORD_BYTES] = record.try_into().ok()?;
        if record[13..] != check(record) {
            return None;
        }
        let (first, rest) = record.split_first_chunk::<8>()?;
        let prefix = NonZeroU64::new(u64::from_le_bytes(*first))?;
        let slot = u32::from_le_bytes(*rest.first_chunk::<4>()?);
        match record[12] {
            1 => Some(Change::Put(prefix, slot)),
            2 => Some(Change::Use(prefix)),
            3 => Some(Change::Drop(prefix)),
            _ => None,
        }
    }
}

/// Tells a record from a torn one and from noise; it is no protection against those who can write the file.
fn check(record: &[u8; RECORD_BYTES]) -> [u8; 3] {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for byte in &record[..13] {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let bytes = (sum ^ sum >> 32).to_le_bytes();
    [bytes[0], bytes[1], bytes[2]]
}

/// The beginning of a journal for so many slots.
pub fn header(slots: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&slots.to_le_bytes());
    header
}

/// How many slots a journal is for; `None` when it is none.
pub fn slots_of(header: &[u8]) -> Option<u32> {
    let slots = u32::from_le_bytes(*header.get(12..)?.first_chunk::<4>()?);
    (header == self::header(slots)).then_some(slots)
}

/// Which page is in which slot.
#[derive(Debug)]
pub struct Index {
    pages: LruCache<Prefix, u32>,
    /// Whose slots they are, up to the last that was ever used.
    owners: Vec<Option<Prefix>>,
    /// Those of them that are nobody's.
    free: BTreeSet<u32>,
    slots: u32,
}

impl Index {
    /// Nothing, in so many slots.
    pub fn new(slots: u32) -> Index {
        Index {
            pages: LruCache::unbounded(),
            owners: Vec::new(),
            free: BTreeSet::new(),
            slots,
        }
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Where a page is.
    pub fn slot(&self, prefix: Prefix) -> Option<u32> {
        self.pages.peek(&prefix).copied()
    }

    /// Takes up a change; one about a slot that there is not is without effect.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put(prefix, slot) => self.put(prefix, slot),
            Change::Use(prefix) => {
                self.pages.promote(&prefix);
            }
            Change::Drop(prefix) => self.drop_page(prefix),
        }
    }

    fn put(&mut self, prefix: Prefix, slot: u32) {
        if slot >= self.slots {
            return;
        }
        self.drop_page(prefix);
        let at = slot as usize;
        if at < self.owners.len() {
            if let Some(old) = self.owners[at] {
                self.pages.pop(&old);
            }
            self.free.remove(&slot);
        } else {
            self.free.extend(self.owners.len() as u32..slot);
            self.owners.resize(at + 1, None);
        }
        self.owners[at] = Some(prefix);
        self.pages.put(prefix, slot);
    }

    fn drop_page(&mut self, prefix: Prefix) {
        if let Some(slot) = self.pages.pop(&prefix) {
            self.owners[slot as usize] = None;
            self.free.insert(slot);
        }
    }

    /// Where the next page goes: a free slot, or that of the page that was not used for the longest time.
    pub fn next_slot(&self) -> Option<u32> {
        if let Some(slot) = self.free.first() {
            return Some(*slot);
        }
        let next = self.owners.len() as u32;
        if next < self.slots {
            return Some(next);
        }
        self.pages.peek_lru().map(|(_, slot)| *slot)
    }

    /// Whether that slot has a page.
    pub fn is_taken(&self, slot: u32) -> bool {
        self.owners.get(slot as usize).is_some_and(Option::is_some)
    }

    /// The pages, those used last first.
    pub fn pages(&self) -> impl Iterator<Item = Prefix> {
        self.pages.iter().map(|(prefix, _)| *prefix)
    }

    /// The shortest list of changes that leads here.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        let oldest_first = self.pages.iter().rev();
        oldest_first.map(|(prefix, slot)| Change::Put(*prefix, *slot))
    }

    /// The same with another number of slots; pages in slots that there are not any more are dropped.
    pub fn resized(&self, slots: u32) -> Index {
        let mut index = Index::new(slots);
        self.changes().for_each(|change| index.apply(change));
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(n: u64) -> Prefix {
        NonZeroU64::new(n).unwrap()
    }

    #[test]
    fn records_survive_and_noise_does_not() {
        for change in [
            Change::Put(page(7), 9),
            Change::Use(page(u64::MAX)),
            Change::Drop(page(1)),
        ] {
            let record = change.encode();
            assert_eq!(Change::decode(&record), Some(change));
            for at in 0..RECORD_BYTES {
                let mut torn = record;
                torn[at] ^= 0x55;
                assert_eq!(Change::decode(&torn), None, "byte {at} of {change:?}");
            }
            assert_eq!(Change::decode(&record[1..]), None);
        }
        assert_eq!(slots_of(&header(77)), Some(77));
        assert_eq!(slots_of(&[0; HEADER_BYTES]), None);
        assert_eq!(slots_of(&header(77)[..20]), None);
    }

    #[test]
    fn the_page_that_was_not_used_for_the_longest_time_goes() {
        let mut index = Index::new(3);
        for n in 1..=3 {
            let slot = index.next_slot().unwrap();
            assert!(!index.is_taken(slot));
            index.apply(Change::Put(page(n), slot));
        }
        index.apply(Change::Use(page(1)));
        let slot = index.next_slot().unwrap();
        assert_eq!(Some(slot), index.slot(page(2)));
        assert!(index.is_taken(slot));
        index.apply(Change::Put(page(4), slot));
        assert_eq!((index.len(), index.slot(page(2))), (3, None));
        index.apply(Change::Drop(page(1)));
        assert_eq!(index.next_slot(), Some(0));
        assert_eq!(index.pages().collect::<Vec<_>>(), [page(4), page(3)]);
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let change = (0u8..3, 1u64..20, 0u32..12).prop_map(|(what, n, slot)| match what {
            0 => Change::Put(page(n), slot),
            1 => Change::Use(page(n)),
            _ => Change::Drop(page(n)),
        });
        prop::collection::vec(change, 0..100)
    }

    proptest! {
        #[test]
        fn a_shortened_journal_leads_to_the_same(changes in changes(), slots in 1u32..10) {
            let mut index = Index::new(slots);
            for change in changes {
                index.apply(change);
                prop_assert!(index.len() <= slots as usize);
                // Each page has a slot of its own, and each taken slot a page.
                let taken = (0..slots).filter(|s| index.is_taken(*s)).count();
                prop_assert_eq!(taken, index.len());
                for p in index.pages() {
                    prop_assert!(index.slot(p).is_some_and(|s| index.owners[s as usize] == Some(p)));
                }
            }
            let again = index.resized(slots);
            prop_assert_eq!(again.changes().collect::<Vec<_>>(), index.changes().collect::<Vec<_>>());
            prop_assert!(index.resized(slots / 2).len() <= slots as usize / 2);
        }

        #[test]
        fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = Change::decode(&noise);
            let _ = slots_of(&noise);
        }
    }
}
