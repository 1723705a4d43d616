//! The frames of a client's HTTP/2 connection, counted as they pass: what costs the client nothing and this proxy work is
//! bounded. The limits are Envoy's (`protocol_constraints.cc`, and `overload.premature_reset_total_stream_count`); PING
//! and SETTINGS, which Envoy bounds only where their answers pile up, are bounded by rate.
//!
//! Floods of CONTINUATION and of headers without a name are stopped by the h2 crate, which knows the limit of headers.

use std::time::{Duration, Instant};

/// Streams after which Envoy looks at how many were reset before they were answered.
const STREAMS: u64 = 500;
/// A stream that lived so long was meant.
const LIFETIME: Duration = Duration::from_secs(1);
/// PRIORITY frames for each stream.
const PRIORITIES: u64 = 100;
/// WINDOW_UPDATE frames for each DATA frame that was sent.
const UPDATES: u64 = 10;
/// DATA and CONTINUATION frames with nothing in them, one after another.
const EMPTY: u64 = 1;
/// PING and SETTINGS frames at once, beyond those that go with streams and data.
const CONTROL: u64 = 1000;
/// How many of them a second gives back.
const CONTROL_RATE: u64 = 100;
/// The client's preface.
const PREFACE: u32 = 24;
/// A frame's head.
const HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// What a client does too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// It resets its requests before they are answered.
    Resets,
    /// PRIORITY.
    Priorities,
    /// WINDOW_UPDATE.
    Updates,
    /// DATA or CONTINUATION without a payload.
    Empty,
    /// PING or SETTINGS.
    Control,
}

impl Flood {
    /// For the client.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Resets => "too many requests were reset before their response",
            Self::Priorities => "too many PRIORITY frames",
            Self::Updates => "too many WINDOW_UPDATE frames",
            Self::Empty => "too many frames without a payload",
            Self::Control => "too many PING or SETTINGS frames",
        }
    }
}

/// Cuts bytes into frames, however they come.
#[derive(Debug, Default)]
struct Walk {
    head: [u8; HEAD],
    /// Bytes of the head that have come.
    have: usize,
    /// Bytes of the payload that have not.
    left: u32,
}

struct Frame {
    length: u32,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Walk {
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        let payload = bytes.len().min(self.left as usize);
        // Not more than is left, which fits.
        self.left -= u32::try_from(payload).unwrap_or(self.left);
        let head = (HEAD - self.have).min(bytes.len() - payload);
        self.head[self.have..self.have + head].copy_from_slice(&bytes[payload..payload + head]);
        *bytes = &bytes[payload + head..];
        self.have += head;
        if self.have < HEAD {
            return None;
        }
        self.have = 0;
        let [a, b, c, kind, flags, stream @ ..] = self.head;
        self.left = u32::from_be_bytes([0, a, b, c]);
        Some(Frame { length: self.left, kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff })
    }

    /// Whether the next byte begins a frame.
    fn between(&self) -> bool {
        self.have == 0 && self.left == 0
    }
}

/// What has passed over one connection.
#[derive(Debug)]
pub struct Frames {
    input: Walk,
    output: Walk,
    /// Bytes that passed while the clock was not looked at are judged together.
    now: Instant,
    /// Streams without the end of a response, by their ids, which rise.
    open: Vec<(u32, Instant)>,
    newest: u32,
    /// A block of headers has been begun, and its last frame has not.
    block: bool,
    /// The last frame that began is of such a block.
    heading: bool,
    streams: u64,
    ended: u64,
    premature: u64,
    priorities: u64,
    updates: u64,
    empty: u64,
    control: u64,
    refilled: Instant,
    sent: u64,
}

impl Frames {
    /// Nothing has passed yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            input: Walk { left: PREFACE, ..Walk::default() },
            output: Walk::default(),
            now,
            open: Vec::new(),
            newest: 0,
            block: false,
            heading: false,
            streams: 0,
            ended: 0,
            premature: 0,
            priorities: 0,
            updates: 0,
            empty: 0,
            control: CONTROL,
            refilled: now,
            sent: 0,
        }
    }

    /// Judges bytes of the client's; gives how many frames began in them.
    ///
    /// # Errors
    /// It is a flood.
    pub fn received(&mut self, mut bytes: &[u8], now: Instant) -> Result<usize, Flood> {
        self.now = now;
        let mut count = 0;
        while let Some(frame) = self.input.next(&mut bytes) {
            self.incoming(&frame)?;
            count += 1;
        }
        Ok(count)
    }

    /// Notes bytes that went to the client.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        while let Some(frame) = self.output.next(&mut bytes) {
            match frame.kind {
                DATA => {
                    self.sent += 1;
                    self.work();
                }
                HEADERS => self.work(),
                _ => {}
            }
            let ends =
                frame.kind == RST_STREAM || matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0;
            if ends {
                self.close(frame.stream);
            }
        }
    }

    /// Whether what was written ends with a whole frame.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.output.between()
    }

    /// Whether the head of a request is under way.
    #[must_use]
    pub fn in_head(&self) -> bool {
        self.block || self.heading && !self.input.between()
    }

    /// The newest stream.
    #[must_use]
    pub fn newest(&self) -> u32 {
        self.newest
    }

    fn incoming(&mut self, frame: &Frame) -> Result<(), Flood> {
        let last = frame.flags & END_STREAM != 0;
        match frame.kind {
            DATA | CONTINUATION if frame.length == 0 && (frame.kind == CONTINUATION || !last) => {
                self.empty += 1;
                over(self.empty, EMPTY, Flood::Empty)?;
            }
            DATA => {
                self.empty = 0;
                self.work();
            }
            HEADERS => {
                self.empty = 0;
                self.work();
                // Trailers belong to a stream that is known.
                if frame.stream > self.newest {
                    self.newest = frame.stream;
                    self.streams += 1;
                    self.open.push((frame.stream, self.now));
                }
            }
            RST_STREAM => {
                if let Some(opened) = self.close(frame.stream)
                    && self.now.saturating_duration_since(opened) < LIFETIME
                {
                    self.premature += 1;
                }
                // As soon as half of the streams that count cannot be good ones any more.
                over(self.premature * 2, self.ended.max(STREAMS) - 1, Flood::Resets)?;
            }
            PRIORITY => {
                self.priorities += 1;
                over(self.priorities, PRIORITIES * (1 + self.streams), Flood::Priorities)?;
            }
            WINDOW_UPDATE => {
                self.updates += 1;
                over(self.updates, 5 + 2 * (self.streams + UPDATES * self.sent), Flood::Updates)?;
            }
            PING | SETTINGS if frame.flags & ACK == 0 => self.control()?,
            _ => {}
        }
        self.heading = matches!(frame.kind, HEADERS | CONTINUATION);
        if self.heading {
            self.block = frame.flags & END_HEADERS == 0;
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), Flood> {
        if self.control == 0 {
            let since = self.now.saturating_duration_since(self.refilled);
            let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
            self.control = (millis.saturating_mul(CONTROL_RATE) / 1000).min(CONTROL);
            self.refilled = self.now;
        }
        self.control = self.control.checked_sub(1).ok_or(Flood::Control)?;
        Ok(())
    }

    /// Something went through that is worth a PING: clients measure with it.
    fn work(&mut self) {
        self.control = (self.control + 1).min(CONTROL);
    }

    fn close(&mut self, stream: u32) -> Option<Instant> {
        let at = self.open.binary_search_by_key(&stream, |(id, _)| *id).ok()?;
        self.ended += 1;
        Some(self.open.remove(at).1)
    }
}

fn over(count: u64, most: u64, flood: Flood) -> Result<(), Flood> {
    if count > most { Err(flood) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    fn connection() -> (Frames, Instant) {
        let now = Instant::now();
        let mut frames = Frames::new(now);
        frames.received(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", now).unwrap();
        (frames, now)
    }

    /// Shows the frames that `make` makes one by one; gives how many passed, and what the next one was.
    fn many(most: u32, make: impl Fn(u32) -> Vec<u8>) -> (u32, Option<Flood>) {
        let (mut frames, now) = connection();
        for number in 0..most {
            if let Err(flood) = frames.received(&make(number), now) {
                return (number, Some(flood));
            }
        }
        (most, None)
    }

    #[test]
    fn frames_are_counted_however_the_bytes_are_cut() {
        let bytes = [frame(HEADERS, 5, 1, b"abc"), frame(DATA, 0, 1, &[0; 300]), frame(PING, 0, 0, &[0; 8])].concat();
        for size in [1, 2, 9, 10, 400] {
            let (mut frames, now) = connection();
            let count: usize = bytes.chunks(size).map(|part| frames.received(part, now).unwrap()).sum();
            assert_eq!((count, frames.streams, frames.input.between()), (3, 1, true), "in parts of {size}");
        }
    }

    #[test]
    fn each_flood_ends_at_its_limit() {
        let update = |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
        assert_eq!(many(100, update), (5, Some(Flood::Updates)));
        assert_eq!(many(200, |_| frame(PRIORITY, 0, 1, &[0; 5])), (100, Some(Flood::Priorities)));
        assert_eq!(many(9, |_| frame(DATA, 0, 1, b"")), (1, Some(Flood::Empty)));
        assert_eq!(many(9, |_| frame(CONTINUATION, 0, 1, b"")), (1, Some(Flood::Empty)));
        assert_eq!(many(2000, |_| frame(PING, 0, 0, &[0; 8])), (1000, Some(Flood::Control)));
        assert_eq!(many(2000, |_| frame(SETTINGS, 0, 0, b"")), (1000, Some(Flood::Control)));
        let reset = |n: u32| [frame(HEADERS, 5, 2 * n + 1, b"a"), frame(RST_STREAM, 0, 2 * n + 1, &[0; 4])].concat();
        assert_eq!(many(2000, reset), (249, Some(Flood::Resets)));
    }

    #[test]
    fn answers_to_our_own_pings_and_settings_are_no_flood() {
        assert_eq!(many(5000, |_| frame(PING, ACK, 0, &[0; 8])), (5000, None));
        assert_eq!(many(5000, |_| frame(SETTINGS, ACK, 0, b"")), (5000, None));
    }

    #[test]
    fn a_request_that_was_answered_may_be_reset() {
        let (mut frames, now) = connection();
        for id in (1..4000).step_by(2) {
            frames.received(&frame(HEADERS, 5, id, b"a"), now).unwrap();
            frames.wrote(&frame(HEADERS, 5, id, b"b"));
            frames.received(&frame(RST_STREAM, 0, id, &[0; 4]), now).unwrap();
        }
        assert_eq!((frames.open.len(), frames.premature), (0, 0));
    }

    #[test]
    fn a_client_that_waited_a_second_may_give_up() {
        let (mut frames, now) = connection();
        for id in (1..2000).step_by(2) {
            frames.received(&frame(HEADERS, 5, id, b"a"), now).unwrap();
        }
        let later = now + LIFETIME;
        for id in (1..2000).step_by(2) {
            frames.received(&frame(RST_STREAM, 0, id, &[0; 4]), later).unwrap();
        }
    }

    #[test]
    fn what_goes_with_data_and_time_is_no_flood() {
        let (mut frames, now) = connection();
        for _ in 0..5000 {
            frames.wrote(&frame(DATA, 0, 1, b"data"));
            frames.received(&frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 4]), now).unwrap();
            frames.received(&frame(PING, 0, 0, &[0; 8]), now).unwrap();
        }
        for second in 1..100 {
            for _ in 0..CONTROL_RATE {
                frames.received(&frame(PING, 0, 0, &[0; 8]), now + Duration::from_secs(second)).unwrap();
            }
        }
    }
}
