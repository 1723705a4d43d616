//! Answers that a fault delays. No host does that by a header: the request waits here, for the ticks of the root that
//! has them anyway, which come sooner as long as something waits.

use std::time::Duration;

use crate::host::{Answer, Host, Level};
use crate::vm::Vm;

/// What waits, and when the ticks come.
#[derive(Debug, Default)]
pub(crate) struct Later {
    /// When (since the Unix epoch), for which request, and what.
    answers: Vec<(Duration, u32, Box<Answer>)>,
    /// The period in milliseconds that the subscription wants, and when its last one began.
    period: u32,
    begun: Duration,
    /// The period that the host has been told.
    told: u32,
}

impl Later {
    /// The subscription wants ticks of this period from now on, or none (0).
    pub(crate) fn subscription(&mut self, period: u32, now: Duration) {
        (self.period, self.begun) = (period, now);
    }

    /// Another root gets the ticks, and has none yet.
    pub(crate) fn moved(&mut self) {
        self.told = 0;
    }

    /// Nobody waits for it any more.
    pub(crate) fn forget(&mut self, context: u32) {
        self.answers.retain(|(_, waiting, _)| *waiting != context);
    }

    /// Milliseconds until the next tick is needed, or those of the subscription's period where nothing waits.
    fn next(&self, now: Duration) -> u32 {
        let Some(due) = self.answers.iter().map(|(due, ..)| *due).min() else { return self.period };
        let period = Duration::from_millis(self.period.into());
        let tick = (self.period > 0).then_some(self.begun + period);
        let left = tick.map_or(due, |tick| tick.min(due)).saturating_sub(now);
        // In whole milliseconds, and not too soon.
        u32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX).max(1)
    }
}

impl<H: Host> Vm<H> {
    /// Answers a request after so many milliseconds; false: there is nothing to wait for.
    pub(crate) fn answer_later(&mut self, context: u32, answer: Box<Answer>, delay: u32) -> bool {
        let (Some(stream), Ok(now)) = (self.stream, self.host.now()) else { return false };
        self.later.answers.push((now + Duration::from_millis(delay.into()), context, answer));
        // Ticks are those of the root that has them.
        let entered = self.host.set_context(stream.root()).is_ok();
        if entered {
            self.arm();
        }
        let back = self.host.set_context(context).is_ok();
        if !(entered && back) {
            self.later.forget(context);
        }
        entered && back
    }

    /// Gives the answers that are due. Whether the subscription's period has passed as well.
    pub(crate) fn give_answers(&mut self) -> bool {
        if self.later.answers.is_empty() {
            return true;
        }
        let (now, Some(stream)) = (self.host.now().unwrap_or(Duration::MAX), self.stream) else { return true };
        let (due, waiting) = std::mem::take(&mut self.later.answers).into_iter().partition(|(at, ..)| *at <= now);
        self.later.answers = waiting;
        let due: Vec<(Duration, u32, Box<Answer>)> = due;
        for (_, context, answer) in due {
            let given = self.host.set_context(context).and_then(|()| self.host.answer(&answer));
            if given.is_err() {
                let _ = self.host.reset_request();
            }
        }
        let _ = self.host.set_context(stream.root());
        let passed = self.later.period > 0
            && now.saturating_sub(self.later.begun) >= Duration::from_millis(self.later.period.into());
        if passed {
            self.later.begun = now;
        }
        passed
    }

    /// Asks the host for the ticks that are needed.
    pub(crate) fn arm(&mut self) {
        let now = if self.later.answers.is_empty() { Duration::ZERO } else { self.host.now().unwrap_or_default() };
        let wanted = self.later.next(now);
        if wanted == self.later.told {
            return;
        }
        match self.host.set_tick(wanted) {
            Ok(()) => self.later.told = wanted,
            Err(status) => self.log(Level::Error, || format!("portolan: the host gives no ticks: {status}")),
        }
    }
}
