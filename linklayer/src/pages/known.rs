//! Pages that the other end has already: they go as hashes.
//!
//! Who waits for a process says once, when it is asked, which pages it has in its page store ([`Known`]): the beginnings of their hashes.
//! The sender hashes each page that it would send, and of one that seems to be known it sends the hash only ([`crate::wire::Kind::KnownPages`]). What
//! turns out not to be there is asked for in the answer to the end of the process ([`crate::wire::LaunchReady`]) and goes as it is. So there is one
//! round trip at the beginning, none with an empty store, and none for a page.

use crate::image::{PAGE, USER_END};
use crate::wire::MAX_BODY_BYTES;

use super::{CHUNK_BYTES, PagesError};

/// The hash of a page: blake3.
pub type Hash = [u8; 32];

/// Bytes of a hash that are told of a page. Of a million pages and a million known ones, about one is taken for one that is known.
const PREFIX_BYTES: usize = 5;
/// Most pages of which somebody says that they are known.
pub const MAX_KNOWN: usize = MAX_BODY_BYTES / 2 / PREFIX_BYTES;
/// Most hashes in one frame.
const MAX_HASHES: usize = CHUNK_BYTES / PAGE as usize;

/// Where pages are had by their hash.
pub trait Source {
    /// Gives a page, which has this hash. False when it is not there.
    fn page(&self, hash: &Hash, page: &mut [u8; PAGE as usize]) -> bool;
}

/// Nothing is there.
#[derive(Debug, Clone, Copy)]
pub struct Nothing;

impl Source for Nothing {
    fn page(&self, _: &Hash, _: &mut [u8; PAGE as usize]) -> bool {
        false
    }
}

/// The pages that the other end has, by the beginnings of their hashes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Known {
    sorted: Vec<[u8; PREFIX_BYTES]>,
}

impl Known {
    /// Of the first 64 bits (big-endian) of hashes; of the first [`MAX_KNOWN`] of them.
    pub fn of(hashes: impl IntoIterator<Item = u64>) -> Known {
        let first = |hash: u64| {
            let mut prefix = [0; PREFIX_BYTES];
            prefix.copy_from_slice(&hash.to_be_bytes()[..PREFIX_BYTES]);
            prefix
        };
        let mut sorted: Vec<_> = hashes.into_iter().take(MAX_KNOWN).map(first).collect();
        sorted.sort_unstable();
        sorted.dedup();
        Known { sorted }
    }

    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        self.sorted.concat()
    }

    /// Reads what was sent.
    ///
    /// # Errors
    /// [`PagesError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Known, PagesError> {
        let (prefixes, rest) = bytes.as_chunks::<PREFIX_BYTES>();
        if !rest.is_empty() || prefixes.len() > MAX_KNOWN || !prefixes.is_sorted() {
            return Err(PagesError::Malformed);
        }
        Ok(Known {
            sorted: prefixes.to_vec(),
        })
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// Whether a page seems to be known.
    pub fn has(&self, hash: &Hash) -> bool {
        let mut prefix = [0; PREFIX_BYTES];
        prefix.copy_from_slice(&hash[..PREFIX_BYTES]);
        self.sorted.binary_search(&prefix).is_ok()
    }
}

/// Reads a frame of hashes: where the first page belongs, and the hashes of that and those that follow.
///
/// # Errors
/// [`PagesError::Malformed`].
pub(super) fn decode(payload: &[u8]) -> Result<(u64, &[Hash]), PagesError> {
    let (address, rest) = payload.split_first_chunk::<8>().ok_or(PagesError::Malformed)?;
    let address = u64::from_le_bytes(*address);
    let (hashes, rest) = rest.as_chunks::<32>();
    let end = address.checked_add(hashes.len() as u64 * PAGE);
    if !rest.is_empty()
        || hashes.is_empty()
        || hashes.len() > MAX_HASHES
        || !address.is_multiple_of(PAGE)
        || end.is_none_or(|end| end > USER_END)
    {
        return Err(PagesError::Malformed);
    }
    Ok((address, hashes))
}

/// How many chunks without a known page it takes until only some pages of a chunk are hashed.
const COLD_CHUNKS: u32 = 4;
/// How many they are.
const SAMPLES: usize = 4;

/// Finds the pages that the other end knows, and does not spend much on a process of which it knows none.
#[derive(Debug, Default)]
pub(super) struct Finder {
    known: Known,
    /// Chunks in a row that had no known page.
    cold: u32,
}

impl Finder {
    pub(super) fn new(known: Known) -> Finder {
        Finder { known, cold: 0 }
    }

    /// The hashes of the pages of a chunk that are known.
    pub(super) fn find(&mut self, run: &[u8]) -> Vec<Option<Hash>> {
        let pages: Vec<&[u8]> = run.chunks(PAGE as usize).collect();
        if self.known.is_empty() || (self.cold >= COLD_CHUNKS && !self.sample(&pages)) {
            return vec![None; pages.len()];
        }
        let look = |page: &&[u8]| {
            let hash = *blake3::hash(page).as_bytes();
            (page.len() == PAGE as usize && self.known.has(&hash)).then_some(hash)
        };
        let found: Vec<_> = pages.iter().map(look).collect();
        if found.iter().any(Option::is_some) {
            self.cold = 0;
        } else {
            self.cold = self.cold.saturating_add(1);
        }
        found
    }

    fn sample(&self, pages: &[&[u8]]) -> bool {
        let step = pages.len().div_ceil(SAMPLES).max(1);
        pages
            .iter()
            .step_by(step)
            .any(|page| self.known.has(blake3::hash(page).as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kept, Writer};
    use super::*;
    use crate::wire::Kind;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const LIMIT: usize = 64 << 20;

    #[derive(Default)]
    struct Store(HashMap<Hash, Vec<u8>>);

    impl Store {
        fn put(&mut self, page: Vec<u8>) {
            self.0.insert(*blake3::hash(&page).as_bytes(), page);
        }

        fn known(&self) -> Known {
            let first = |hash: &Hash| u64::from_be_bytes(*hash.first_chunk::<8>().unwrap());
            Known::of(self.0.keys().map(first))
        }
    }

    impl Source for Store {
        fn page(&self, hash: &Hash, page: &mut [u8; PAGE as usize]) -> bool {
            let Some(content) = self.0.get(hash) else {
                return false;
            };
            page.copy_from_slice(content);
            true
        }
    }

    fn page(n: u16) -> Vec<u8> {
        let mut page = vec![3; PAGE as usize];
        page[..2].copy_from_slice(&n.to_le_bytes());
        page
    }

    /// Sends memory to somebody with this store. Gives what arrived and how many bytes were sent.
    fn send(memory: &[u8], store: &Store, known: Option<Known>) -> (Kept, Writer) {
        let mut writer = Writer::default();
        if let Some(known) = known {
            writer.knows(known);
        }
        let mut kept = Kept::default();
        for (i, chunk) in memory.chunks(CHUNK_BYTES).enumerate() {
            let at = (i * CHUNK_BYTES) as u64;
            let done: Result<(), PagesError> = writer.write(at, chunk, &mut |kind, parts| {
                kept.take(kind, &parts.concat(), store, LIMIT)
            });
            done.unwrap();
        }
        (kept, writer)
    }

    fn content(kept: &Kept) -> Vec<u8> {
        kept.runs().flat_map(|(_, data)| data.to_vec()).collect()
    }

    #[test]
    fn what_is_known_is_not_sent_and_what_is_not_there_is_asked_for() {
        let memory: Vec<u8> = (0..200).flat_map(page).collect();
        let mut store = Store::default();
        let (kept, first) = send(&memory, &store, Some(store.known()));
        assert_eq!(content(&kept), memory);
        assert_eq!(first.counts.stored, 0);
        (0..200).for_each(|n| store.put(page(n)));
        let (kept, again) = send(&memory, &store, Some(store.known()));
        assert_eq!(content(&kept), memory);
        assert_eq!((again.counts.stored, again.counts.saved_bytes), (200, 200 * PAGE));
        assert!(again.counts.bytes < 200 * 40, "{:?}", again.counts);
        assert!(kept.missing(100).is_empty());
        // It was there when it was asked, and is not any more.
        let known = store.known();
        for n in [7, 8, 9, 150] {
            store.0.retain(|_, content| *content != page(n));
        }
        let (mut kept, mut writer) = send(&memory, &store, Some(known));
        let missing = kept.missing(100);
        assert_eq!(missing, [(7 * PAGE, 10 * PAGE), (150 * PAGE, 151 * PAGE)]);
        assert_eq!(kept.missing(1), [(7 * PAGE, 10 * PAGE)]);
        writer.was_missing(&missing);
        assert_eq!(writer.counts.stored, 196);
        for (start, end) in missing {
            let data = &memory[start as usize..end as usize];
            let done: Result<(), PagesError> = writer.write(start, data, &mut |kind, parts| {
                assert_ne!(kind, Kind::KnownPages);
                kept.take(kind, &parts.concat(), &store, LIMIT)
            });
            done.unwrap();
        }
        assert_eq!(content(&kept), memory);
        assert!(kept.missing(100).is_empty());
    }

    #[test]
    fn a_hash_takes_the_place_of_what_came_before() {
        let mut kept = Kept::default();
        let whole = [&0u64.to_le_bytes()[..], &page(1)].concat();
        kept.take(Kind::Pages, &whole, &Nothing, LIMIT).unwrap();
        let hash = [&0u64.to_le_bytes()[..], &[5; 32]].concat();
        kept.take(Kind::KnownPages, &hash, &Nothing, LIMIT).unwrap();
        // The old content would be wrong.
        assert_eq!((kept.bytes(), kept.runs().count()), (0, 0));
        assert_eq!(kept.missing(9), [(0, PAGE)]);
        kept.retain(&[(PAGE, 2 * PAGE)]);
        assert!(kept.missing(9).is_empty());
    }

    #[test]
    fn little_is_hashed_for_a_node_that_knows_nothing_of_it() {
        let mut store = Store::default();
        store.put(page(9999));
        let mut finder = Finder::new(store.known());
        let strange: Vec<u8> = (0..64).flat_map(page).collect();
        for _ in 0..COLD_CHUNKS {
            finder.find(&strange);
        }
        assert_eq!(finder.cold, COLD_CHUNKS);
        // What is known after all is found again.
        let mut mixed = strange.clone();
        mixed[..PAGE as usize].copy_from_slice(&page(9999));
        assert!(finder.find(&mixed)[0].is_some());
        assert_eq!(finder.cold, 0);
    }

    #[test]
    fn nonsense_is_refused() {
        let frame =
            |address: u64, hashes: usize| [&address.to_le_bytes()[..], &vec![1; 32 * hashes]].concat();
        assert!(decode(&frame(0, MAX_HASHES)).is_ok());
        for bad in [
            frame(0, MAX_HASHES + 1),
            frame(0, 0),
            frame(1, 1),
            frame(USER_END, 1),
            frame(u64::MAX / PAGE * PAGE, 2),
            vec![0; 7],
            vec![0; 8 + 33],
        ] {
            assert_eq!(decode(&bad), Err(PagesError::Malformed));
        }
        assert!(Known::decode(&[0; 7]).is_err());
        assert!(Known::decode(&[2, 0, 0, 0, 0, 1, 0, 0, 0, 0]).is_err());
        assert!(Known::decode(&vec![0; (MAX_KNOWN + 1) * PREFIX_BYTES]).is_err());
        // Hashes of more pages than a process may bring.
        let mut kept = Kept::default();
        let limit = 3 * PAGE as usize;
        assert!(kept.take(Kind::KnownPages, &frame(0, 3), &Nothing, limit).is_ok());
        assert_eq!(
            kept.take(Kind::KnownPages, &frame(8 * PAGE, 1), &Nothing, limit),
            Err(PagesError::TooMany)
        );
    }

    proptest! {
        #[test]
        fn what_arrives_is_what_was_sent(
            memory in prop::collection::vec(0u16..40, 1..200),
            stored in prop::collection::btree_set(0u16..40, 0..40),
            lost in prop::collection::btree_set(0u16..40, 0..10),
        ) {
            let content_of = |n: &u16| if *n == 0 { vec![0; PAGE as usize] } else { page(*n) };
            let memory: Vec<u8> = memory.iter().flat_map(content_of).collect();
            let mut store = Store::default();
            stored.iter().for_each(|n| store.put(page(*n)));
            let known = Known::decode(&store.known().encode()).unwrap();
            prop_assert_eq!(&known, &store.known());
            store.0.retain(|_, content| !lost.iter().any(|n| *content == page(*n)));
            let (mut kept, mut writer) = send(&memory, &store, Some(known));
            let missing = kept.missing(usize::MAX);
            writer.was_missing(&missing);
            for (start, end) in missing {
                for (at, chunk) in (start..end).step_by(PAGE as usize).zip(memory[start as usize..end as usize].chunks(PAGE as usize)) {
                    let done: Result<(), PagesError> =
                        writer.write(at, chunk, &mut |kind, parts| kept.take(kind, &parts.concat(), &store, LIMIT));
                    done.unwrap();
                }
            }
            prop_assert_eq!(content(&kept), memory);
            prop_assert!(kept.missing(1).is_empty());
        }

        #[test]
        fn garbage_never_panics(payload in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&payload);
            let _ = Known::decode(&payload);
        }
    }
}
