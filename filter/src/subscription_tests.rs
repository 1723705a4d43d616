use portolan_proto::v1::Page;
use portolan_registry::row::CatchAll;
use portolan_registry::write::Writer;

use super::*;
use crate::testing::{outgoing, rows, whole, writer};

fn new() -> Subscription {
    Subscription::new(Scope { namespace: "n".into(), ..Default::default() }, "test".into(), 42)
}

fn open() -> (Subscription, Subscribe) {
    let mut subscription = new();
    assert_eq!(subscription.start(), [Action::Open]);
    let subscribe = subscribed(&subscription.on_open());
    (subscription, subscribe)
}

/// A subscription in which the first version of the rows is in force.
fn fresh() -> (Subscription, Writer) {
    let (mut subscription, _) = open();
    let writer = writer(&rows(CatchAll::Block));
    feed(&mut subscription, &whole(&writer, 1));
    assert_eq!(subscription.state(), State::Fresh);
    (subscription, writer)
}

fn feed(subscription: &mut Subscription, parts: &[WatchResponse]) -> Vec<Action> {
    parts.iter().flat_map(|part| subscription.on_message(&part.encode_to_vec())).collect()
}

fn sent(actions: &[Action]) -> Vec<Outgoing> {
    let message = |action: &Action| if let Action::Send(m) = action { Some(outgoing(m)) } else { None };
    actions.iter().filter_map(message).collect()
}

fn subscribed(actions: &[Action]) -> Subscribe {
    match sent(actions).as_slice() {
        [Outgoing::Subscribe(subscribe)] => subscribe.clone(),
        other => panic!("expected Subscribe, got {other:?}"),
    }
}

fn refusal(actions: &[Action]) -> (u64, String) {
    match sent(actions).as_slice() {
        [Outgoing::Nack(nack)] => (nack.version, nack.reason.clone()),
        other => panic!("expected Nack, got {other:?}"),
    }
}

fn period(actions: &[Action]) -> Option<u32> {
    let tick = |action: &Action| if let Action::Tick(period) = action { Some(*period) } else { None };
    actions.iter().rev().find_map(tick)
}

/// Ticks until the stream is to be opened; gives how long that took, in milliseconds.
fn wait_for_open(subscription: &mut Subscription) -> u32 {
    let mut waited = 0;
    for _ in 0..1000 {
        waited += subscription.tick;
        if subscription.on_tick().contains(&Action::Open) {
            return waited;
        }
    }
    panic!("not opened again after {waited} ms");
}

/// Ticks until none is asked for.
fn settle(subscription: &mut Subscription) {
    for _ in 0..1000 {
        if subscription.tick == 0 {
            return;
        }
        subscription.on_tick();
    }
    panic!("still ticking each {} ms", subscription.tick);
}

/// One row less than [`rows`], as a difference.
fn change(writer: &mut Writer, version: u64) -> WatchResponse {
    writer.remove(&rows(CatchAll::Block)[3].key());
    let commit = writer.commit();
    let page = |id: &u32| Page { id: *id, data: writer.page(*id).unwrap().to_vec() };
    let pages = commit.changed.iter().map(page).collect();
    WatchResponse { version, pages, removed: commit.removed, last: true, digest: writer.digest() }
}

#[test]
fn subscribes_with_nothing_then_takes_an_update_whole() {
    let (mut subscription, subscribe) = open();
    assert_eq!((subscribe.held.len(), subscribe.version, subscribe.format), (0, 0, u32::from(FORMAT)));
    assert_eq!(subscribe.scope.unwrap().namespace, "n");
    let writer = writer(&rows(CatchAll::Block));
    let mut parts = whole(&writer, 7);
    let last = parts.pop().unwrap();
    feed(&mut subscription, &parts);
    assert_eq!(subscription.state(), State::None);
    let actions = feed(&mut subscription, &[last]);
    assert_eq!(sent(&actions), [Outgoing::Ack(Ack { version: 7 })]);
    assert_eq!((subscription.state(), subscription.version()), (State::Fresh, 7));
}

#[test]
fn each_part_but_the_last_is_said_to_be_taken() {
    let (mut subscription, subscribe) = open();
    assert_eq!(subscribe.window, WINDOW);
    let mut writer = writer(&rows(CatchAll::Block));
    let part = WatchResponse { version: 5, ..Default::default() };
    let taken = [Outgoing::Taken(Taken { version: 5 })];
    assert_eq!(sent(&feed(&mut subscription, &[part.clone(), part.clone()])), [taken.clone(), taken.clone()].concat());
    assert_eq!(sent(&feed(&mut subscription, &whole(&writer, 5))), [Outgoing::Ack(Ack { version: 5 })]);
    // What is ignored after a refusal is taken too, or the controller would keep the rest to itself.
    let broken = WatchResponse { version: 5, pages: vec![Page { id: 1, data: vec![1; 9] }], ..Default::default() };
    refusal(&feed(&mut subscription, &[broken]));
    assert_eq!(sent(&feed(&mut subscription, &[part])), taken);
    assert_eq!(sent(&feed(&mut subscription, &[change(&mut writer, 5)])), []);
}

#[test]
fn an_idle_subscription_asks_for_no_ticks() {
    let (mut subscription, _) = fresh();
    settle(&mut subscription);
    assert_eq!(subscription.tick, 0);
}

#[test]
fn a_lost_stream_leaves_the_snapshot_and_resumes_from_it() {
    let (mut subscription, mut writer) = fresh();
    let held = subscription.snapshot().unwrap().held();
    subscription.on_close("gRPC status 14");
    assert_eq!(subscription.state(), State::Stale);
    assert!(subscription.snapshot().is_some());
    wait_for_open(&mut subscription);
    let subscribe = subscribed(&subscription.on_open());
    assert_eq!((subscribe.held, subscribe.version), (held, 1));
    assert_eq!(subscription.state(), State::Stale);
    let actions = feed(&mut subscription, &[change(&mut writer, 2)]);
    assert_eq!(sent(&actions), [Outgoing::Ack(Ack { version: 2 })]);
    assert_eq!(subscription.snapshot().unwrap().digest(), writer.digest());
}

#[test]
fn an_update_with_nothing_new_makes_it_fresh_again() {
    let (mut subscription, writer) = fresh();
    subscription.on_close("gRPC status 14");
    wait_for_open(&mut subscription);
    subscription.on_open();
    let nothing = WatchResponse { version: 1, last: true, digest: writer.digest(), ..Default::default() };
    feed(&mut subscription, &[nothing]);
    assert_eq!(subscription.state(), State::Fresh);
}

#[test]
fn parts_of_a_lost_stream_are_forgotten() {
    let (mut subscription, _) = open();
    let writer = writer(&rows(CatchAll::Block));
    let parts = whole(&writer, 1);
    feed(&mut subscription, &parts[..parts.len() - 1]);
    subscription.on_close("gRPC status 14");
    wait_for_open(&mut subscription);
    subscription.on_open();
    let actions = feed(&mut subscription, &parts);
    assert_eq!(sent(&actions), [Outgoing::Ack(Ack { version: 1 })]);
}

#[test]
fn a_wrong_digest_is_refused_and_the_last_good_stays() {
    let (mut subscription, mut writer) = fresh();
    let before = subscription.snapshot().unwrap().digest();
    let mut update = change(&mut writer, 2);
    update.digest ^= 1;
    let actions = feed(&mut subscription, &[update]);
    let (version, reason) = refusal(&actions);
    assert_eq!(version, 2);
    assert!(reason.contains("digest"), "{reason}");
    assert_eq!((subscription.state(), subscription.version()), (State::Stale, 1));
    assert_eq!(subscription.snapshot().unwrap().digest(), before);
    assert!(actions.contains(&Action::Count(Count::Refused)));
}

#[test]
fn after_a_refusal_the_rest_of_it_is_ignored_and_the_next_is_whole() {
    let (mut subscription, mut writer) = fresh();
    let broken = WatchResponse { version: 2, pages: vec![Page { id: 1, data: vec![1; 9] }], ..Default::default() };
    assert_eq!(refusal(&feed(&mut subscription, &[broken])).0, 2);
    let rest = WatchResponse { version: 2, last: true, ..Default::default() };
    assert_eq!(sent(&feed(&mut subscription, &[rest])), []);
    change(&mut writer, 3);
    let actions = feed(&mut subscription, &whole(&writer, 3));
    assert_eq!(sent(&actions), [Outgoing::Ack(Ack { version: 3 })]);
    assert_eq!(subscription.snapshot().unwrap().digest(), writer.digest());
}

#[test]
fn refused_twice_it_starts_from_nothing_and_goes_on_deciding() {
    let (mut subscription, writer) = fresh();
    let broken = |version| WatchResponse { version, last: true, digest: 1, ..Default::default() };
    feed(&mut subscription, &[broken(2)]);
    let actions = feed(&mut subscription, &[broken(3)]);
    assert!(actions.contains(&Action::Close));
    assert!(subscription.snapshot().is_some());
    wait_for_open(&mut subscription);
    let subscribe = subscribed(&subscription.on_open());
    assert_eq!((subscribe.held.len(), subscribe.version), (0, 0));
    feed(&mut subscription, &whole(&writer, 4));
    assert_eq!((subscription.state(), subscription.version()), (State::Fresh, 4));
}

#[test]
fn a_refused_update_is_asked_for_again() {
    let (mut subscription, _) = fresh();
    feed(&mut subscription, &[WatchResponse { version: 2, last: true, digest: 1, ..Default::default() }]);
    let waited = wait_for_open(&mut subscription);
    assert!((ANSWER_LIMIT..ANSWER_LIMIT + 6_000).contains(&waited), "{waited}");
}

#[test]
fn what_breaks_the_protocol_ends_the_stream() {
    let version = |version| WatchResponse { version, ..Default::default() }.encode_to_vec();
    let cases: [Vec<Vec<u8>>; 3] = [vec![vec![0xff; 40]], vec![vec![0; MAX_MESSAGE + 1]], vec![version(2), version(3)]];
    for messages in cases {
        let (mut subscription, _) = fresh();
        let actions: Vec<Action> = messages.iter().flat_map(|m| subscription.on_message(m)).collect();
        assert!(actions.contains(&Action::Close), "{actions:?}");
        assert!(actions.contains(&Action::Count(Count::Closed)));
        assert_eq!(subscription.state(), State::Stale);
    }
}

#[test]
fn an_answer_that_is_owed_too_long_ends_the_stream() {
    let (mut subscription, _) = open();
    let mut waited = 0;
    while !subscription.on_tick().contains(&Action::Close) {
        waited += ANSWER_CHECK;
        assert!(waited <= ANSWER_LIMIT);
    }
}

#[test]
fn back_off_doubles_within_bounds_and_a_good_update_resets_it() {
    let (mut subscription, _) = open();
    let mut longest = BACKOFF_BASE;
    for attempt in 0..12 {
        let left = period(&subscription.on_close("gRPC status 14")).unwrap();
        assert!((longest / 2..=longest).contains(&left), "attempt {attempt}: {left} of {longest}");
        longest = (longest * 2).min(BACKOFF_MAX);
        assert_eq!(wait_for_open(&mut subscription), left);
        subscription.on_open();
    }
    feed(&mut subscription, &whole(&writer(&rows(CatchAll::Block)), 1));
    settle(&mut subscription);
    let left = period(&subscription.on_close("gRPC status 0")).unwrap();
    assert!(left <= BACKOFF_BASE, "{left}");
}

#[test]
fn workers_do_not_knock_all_at_once() {
    let wait = |seed| {
        let mut subscription = Subscription::new(Scope::default(), String::new(), seed);
        subscription.start();
        (0..8).map(|_| period(&subscription.on_close("")).unwrap_or_default()).collect::<Vec<_>>()
    };
    assert_ne!(wait(1), wait(1 << 40));
}

#[test]
fn messages_on_a_closed_stream_are_ignored() {
    let mut subscription = new();
    assert_eq!(subscription.on_message(&[0xff; 9]), []);
}

#[test]
fn no_message_cut_or_flipped_anywhere_takes_effect_or_panics() {
    let (_, mut writer) = fresh();
    let update = change(&mut writer, 2).encode_to_vec();
    for at in 0..update.len() {
        for bit in [0x01, 0x80] {
            let (mut subscription, good) = fresh();
            let mut flipped = update.clone();
            flipped[at] ^= bit;
            subscription.on_message(&flipped);
            let digest = subscription.snapshot().unwrap().digest();
            assert!(digest == good.digest() || digest == writer.digest(), "flipped at {at}");
        }
        let (mut subscription, _) = fresh();
        subscription.on_message(&update[..at]);
        assert!(subscription.snapshot().is_some(), "cut at {at}");
    }
}
