//! Consistent hashing as Envoy does it, so that both hosts send a key to the same endpoint.

use twox_hash::XxHash64;

/// Most entries of a ring (Envoy's default).
const LARGEST: f64 = 8_388_608.0;

/// Which endpoint a hash belongs to.
pub enum Table {
    /// Points on a ring, in order, and their endpoints.
    Ring(Vec<(u64, u32)>),
    /// Maglev's table of endpoints.
    Maglev(Vec<u32>),
}

/// The hash of the value that a request is kept together by.
#[must_use]
pub fn of(value: &[u8]) -> u64 {
    XxHash64::oneshot(0, value)
}

impl Table {
    /// A ring of at least `least` points; `members` are keys and weights.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "sizes and weights are far from 2^52")]
    pub fn ring(members: &[(String, u64)], least: u64) -> Self {
        let total = members.iter().map(|member| member.1).sum::<u64>().max(1) as f64;
        let lightest = members.iter().map(|member| member.1).min().unwrap_or(1) as f64 / total;
        let scale = ((lightest * least as f64).ceil() / lightest).min(LARGEST);
        let mut points = Vec::new();
        let (mut wanted, mut made) = (0.0, 0.0);
        for (index, (key, weight)) in (0u32..).zip(members) {
            wanted += scale * *weight as f64 / total;
            let mut copy = 0u64;
            while made < wanted {
                points.push((of(format!("{key}_{copy}").as_bytes()), index));
                copy += 1;
                made += 1.0;
            }
        }
        points.sort_unstable();
        Self::Ring(points)
    }

    /// Maglev's table; `size` is a prime, `members` are keys and weights.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "sizes and weights are far from 2^52")]
    pub fn maglev(members: &[(String, u64)], size: u64) -> Self {
        struct Turn {
            offset: u64,
            skip: u64,
            next: u64,
            weight: f64,
            wanted: f64,
        }
        let heaviest = members.iter().map(|member| member.1).max().unwrap_or(1).max(1) as f64;
        let size = size.max(2);
        let mut turns: Vec<Turn> = (members.iter())
            .map(|(key, weight)| Turn {
                offset: of(key.as_bytes()) % size,
                skip: XxHash64::oneshot(1, key.as_bytes()) % (size - 1) + 1,
                next: 0,
                weight: *weight as f64,
                wanted: 0.0,
            })
            .collect();
        let mut table = vec![u32::MAX; usize::try_from(size).unwrap_or(usize::MAX)];
        let mut left = if members.is_empty() { 0 } else { size };
        let mut round = 1.0;
        while left > 0 {
            for (index, turn) in (0u32..).zip(&mut turns) {
                if round * turn.weight < turn.wanted {
                    continue;
                }
                turn.wanted += heaviest;
                loop {
                    let at = (turn.offset + turn.skip * turn.next) % size;
                    turn.next += 1;
                    // Each member visits every place, so that a free one is found while there is one.
                    let place = usize::try_from(at).ok().and_then(|at| table.get_mut(at));
                    if let Some(free) = place.filter(|place| **place == u32::MAX) {
                        *free = index;
                        break;
                    }
                }
                left -= 1;
                if left == 0 {
                    break;
                }
            }
            round += 1.0;
        }
        if members.is_empty() { Self::Maglev(Vec::new()) } else { Self::Maglev(table) }
    }

    /// The endpoint's index; `attempt`: how often another one was asked for.
    #[must_use]
    pub fn choose(&self, hash: u64, attempt: u32) -> Option<usize> {
        let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
        let index = match self {
            Self::Ring(points) => {
                let at = points.partition_point(|point| point.0 < hash);
                points.get(at).or_else(|| points.first())?.1
            }
            Self::Maglev(table) => {
                let size = u64::try_from(table.len()).ok().filter(|size| *size > 0)?;
                *table.get(usize::try_from(hash % size).ok()?)?
            }
        };
        usize::try_from(index).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: u64) -> Vec<(String, u64)> {
        (0..count).map(|n| (format!("10.0.0.{n}:80"), n % 2 + 1)).collect()
    }

    fn tables(count: u64) -> [Table; 2] {
        [Table::ring(&members(count), 1024), Table::maglev(&members(count), 65537)]
    }

    #[test]
    fn shares_follow_the_weights() {
        for table in tables(4) {
            let mut counts = [0u32; 4];
            for key in 0..60_000u32 {
                counts[table.choose(of(&key.to_le_bytes()), 0).unwrap()] += 1;
            }
            let heavy = f64::from(counts[1] + counts[3]) / 60_000.0;
            assert!((0.6..0.73).contains(&heavy), "{counts:?}");
        }
    }

    #[test]
    fn an_endpoint_that_goes_moves_few_of_the_others_keys() {
        for (four, three) in tables(4).into_iter().zip(tables(3)) {
            let keys = (0..20_000u32).map(|key| of(&key.to_le_bytes()));
            let stay = keys.filter(|key| four.choose(*key, 0).is_some_and(|at| at < 3));
            let (mut all, mut moved) = (0, 0);
            for key in stay {
                all += 1;
                moved += u32::from(four.choose(key, 0) != three.choose(key, 0));
            }
            // Those that stay get points of their own for what went, as in Envoy's ring of a least size.
            assert!(moved * 3 < all, "{moved} of {all}");
        }
    }

    #[test]
    fn another_attempt_may_go_elsewhere_and_nothing_has_no_place() {
        for table in tables(4) {
            let elsewhere = |key: &u32| {
                let hash = of(&key.to_le_bytes());
                table.choose(hash, 0) != table.choose(hash, 1)
            };
            assert!((0..1000).filter(elsewhere).count() > 500);
        }
        assert_eq!(Table::ring(&[], 1024).choose(1, 0), None);
        assert_eq!(Table::maglev(&[], 7).choose(1, 0), None);
    }

    #[test]
    fn the_hash_is_envoys() {
        // XXH64 of nothing with seed 0, as its specification has it.
        assert_eq!(of(b""), 0xef46_db37_51d8_e999);
    }
}
