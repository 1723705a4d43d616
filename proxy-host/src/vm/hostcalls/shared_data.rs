//! Key-value data and queues that VMs share.

use super::{ENV, HostState};
use crate::vm::memory::{Fault, finish, give, read, read_str, split, write_u32};
use wasmtime::{Caller, Linker};

pub(super) fn link(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        ENV,
        "proxy_get_shared_data",
        |caller: Caller<'_, HostState>, key: u32, key_len: u32, to: u32, to_len: u32, to_cas: u32| {
            finish(get(caller, key, key_len, to, to_len, to_cas))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_set_shared_data",
        |caller: Caller<'_, HostState>, key: u32, key_len: u32, at: u32, len: u32, cas: u32| {
            finish(set(caller, key, key_len, at, len, cas))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_register_shared_queue",
        |caller: Caller<'_, HostState>, name: u32, len: u32, to: u32| finish(register(caller, name, len, to)),
    )?;
    linker.func_wrap(
        ENV,
        "proxy_resolve_shared_queue",
        |caller: Caller<'_, HostState>, vm: u32, vm_len: u32, name: u32, len: u32, to: u32| {
            finish(resolve(caller, vm, vm_len, name, len, to))
        },
    )?;
    linker.func_wrap(
        ENV,
        "proxy_enqueue_shared_queue",
        |caller: Caller<'_, HostState>, id: u32, at: u32, len: u32| finish(enqueue(caller, id, at, len)),
    )?;
    linker.func_wrap(
        ENV,
        "proxy_dequeue_shared_queue",
        |caller: Caller<'_, HostState>, id: u32, to: u32, to_len: u32| finish(dequeue(caller, id, to, to_len)),
    )?;
    Ok(())
}

fn get(
    mut caller: Caller<'_, HostState>,
    key: u32,
    key_len: u32,
    to: u32,
    to_len: u32,
    to_cas: u32,
) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let (value, cas) = state.shared.get(&state.vm_id, read(memory, key, key_len)?)?;
    write_u32(memory, to_cas, cas)?;
    give(&mut caller, &value, to, to_len)
}

fn set(mut caller: Caller<'_, HostState>, key: u32, key_len: u32, at: u32, len: u32, cas: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    Ok(state.shared.set(&state.vm_id, read(memory, key, key_len)?, read(memory, at, len)?, cas)?)
}

fn register(mut caller: Caller<'_, HostState>, name: u32, len: u32, to: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let root = state.root().map_or(0, |root| root.id.0);
    let name = read(memory, name, len)?;
    let id = state.shared.register_queue(&state.vm_id, name, root, state.queue_waker.clone())?;
    Ok(write_u32(memory, to, id)?)
}

fn resolve(mut caller: Caller<'_, HostState>, vm: u32, vm_len: u32, name: u32, len: u32, to: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    let id = state.shared.resolve_queue(read_str(memory, vm, vm_len)?, read(memory, name, len)?)?;
    Ok(write_u32(memory, to, id)?)
}

fn enqueue(mut caller: Caller<'_, HostState>, id: u32, at: u32, len: u32) -> Result<(), Fault> {
    let (memory, state) = split(&mut caller)?;
    Ok(state.shared.enqueue(id, read(memory, at, len)?)?)
}

fn dequeue(mut caller: Caller<'_, HostState>, id: u32, to: u32, to_len: u32) -> Result<(), Fault> {
    let message = caller.data().shared.dequeue(id)?;
    give(&mut caller, &message, to, to_len)
}
