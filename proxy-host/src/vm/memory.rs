//! Reading and writing the guest's memory, always checked against its bounds.

use super::abi::Status;
use super::state::HostState;
use wasmtime::Caller;

/// Why a hostcall stopped.
pub(super) enum Fault {
    /// The guest is told.
    Status(Status),
    /// The guest cannot go on: its allocator trapped or ran out of time.
    Trap(wasmtime::Error),
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// What a hostcall gives back to wasmtime.
pub(super) fn finish(result: Result<(), Fault>) -> wasmtime::Result<u32> {
    match result {
        Ok(()) => Ok(Status::Ok as u32),
        Err(Fault::Status(status)) => Ok(status as u32),
        Err(Fault::Trap(error)) => Err(error),
    }
}

/// The guest's memory and the host's state, both at once.
pub(super) fn split<'a>(caller: &'a mut Caller<'_, HostState>) -> Result<(&'a mut [u8], &'a mut HostState), Status> {
    let memory = caller.data().memory.ok_or(Status::InvalidMemoryAccess)?;
    Ok(memory.data_and_store_mut(caller))
}

/// `len` bytes at `at`.
pub(super) fn read(memory: &[u8], at: u32, len: u32) -> Result<&[u8], Status> {
    let (at, len) = (at as usize, len as usize);
    at.checked_add(len).and_then(|end| memory.get(at..end)).ok_or(Status::InvalidMemoryAccess)
}

/// Text at `at`; names of ours are ASCII.
pub(super) fn read_str(memory: &[u8], at: u32, len: u32) -> Result<&str, Status> {
    std::str::from_utf8(read(memory, at, len)?).map_err(|_| Status::BadArgument)
}

/// Writes `bytes` at `at`.
pub(super) fn write(memory: &mut [u8], at: u32, bytes: &[u8]) -> Result<(), Status> {
    let at = at as usize;
    let end = at.checked_add(bytes.len()).ok_or(Status::InvalidMemoryAccess)?;
    memory.get_mut(at..end).ok_or(Status::InvalidMemoryAccess)?.copy_from_slice(bytes);
    Ok(())
}

/// Writes a little-endian word at `at`.
pub(super) fn write_u32(memory: &mut [u8], at: u32, value: u32) -> Result<(), Status> {
    write(memory, at, &value.to_le_bytes())
}

/// Copies `bytes` into memory that the guest allocates, and their place and length to where the guest wants them.
/// Nothing is allocated for no bytes.
pub(super) fn give(caller: &mut Caller<'_, HostState>, bytes: &[u8], to: u32, to_len: u32) -> Result<(), Fault> {
    let len = u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?;
    let mut at = 0;
    if len > 0 {
        // A pointer that cannot be written must not cost an allocation that nobody frees.
        let (memory, state) = split(caller)?;
        read(memory, to, 4)?;
        read(memory, to_len, 4)?;
        let allocate = state.allocate.clone().ok_or(Status::InternalFailure)?;
        at = allocate.call(&mut *caller, len).map_err(Fault::Trap)?;
        if at == 0 {
            return Err(Status::InternalFailure.into());
        }
    }
    let (memory, _) = split(caller)?;
    write(memory, at, bytes)?;
    write_u32(memory, to, at)?;
    write_u32(memory, to_len, len)?;
    Ok(())
}

/// As [`give`], for a value that `fill` writes into the state's scratch buffer.
pub(super) fn give_with(
    caller: &mut Caller<'_, HostState>,
    to: u32,
    to_len: u32,
    fill: impl FnOnce(&[u8], &mut HostState, &mut Vec<u8>) -> Result<(), Status>,
) -> Result<(), Fault> {
    let (memory, state) = split(caller)?;
    let mut scratch = std::mem::take(&mut state.scratch);
    scratch.clear();
    let result = match fill(memory, state, &mut scratch) {
        Ok(()) => give(caller, &scratch, to, to_len),
        Err(status) => Err(status.into()),
    };
    caller.data_mut().scratch = scratch;
    result
}
