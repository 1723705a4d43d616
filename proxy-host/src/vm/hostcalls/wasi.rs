//! The part of WASI preview 1 that language runtimes need to start: output goes to the log, there is no file, no
//! argument and no environment.

use super::HostState;
use crate::vm::abi::LogLevel;
use crate::vm::memory::{read, split, write, write_u32};
use wasmtime::{Caller, ExternType, ImportType, Linker, Module, Val, ValType};

const WASI: &str = "wasi_snapshot_preview1";
/// What older toolchains call it.
const UNSTABLE: &str = "wasi_unstable";

/// Functions that Envoy knows too, without anything behind them.
const UNSUPPORTED: [&str; 28] = [
    "fd_advise",
    "fd_allocate",
    "fd_datasync",
    "fd_fdstat_set_rights",
    "fd_filestat_get",
    "fd_filestat_set_size",
    "fd_filestat_set_times",
    "fd_pread",
    "fd_pwrite",
    "fd_read",
    "fd_readdir",
    "fd_renumber",
    "fd_seek",
    "fd_sync",
    "fd_tell",
    "path_create_directory",
    "path_filestat_get",
    "path_filestat_set_times",
    "path_link",
    "path_readlink",
    "path_remove_directory",
    "path_rename",
    "path_symlink",
    "path_unlink_file",
    "sock_accept",
    "sock_recv",
    "sock_send",
    "sock_shutdown",
];

const SUCCESS: u32 = 0;
const BADF: u32 = 8;
const FAULT: u32 = 21;
const INVAL: u32 = 28;
const IO: u32 = 29;
const NOENT: u32 = 44;
const NOSYS: i32 = 52;

/// A line longer than this is logged in pieces.
const MAX_LINE: usize = 4096;

/// The guest ended itself.
#[derive(Debug, thiserror::Error)]
#[error("exited with code {0}")]
pub(in crate::vm) struct Exit(pub(in crate::vm) u32);

pub(super) fn link(linker: &mut Linker<HostState>, module: &Module) -> wasmtime::Result<()> {
    linker.func_wrap(WASI, "fd_write", |caller: Caller<'_, HostState>, fd: u32, iov: u32, count: u32, to: u32| {
        errno(fd_write(caller, fd, iov, count, to))
    })?;
    for name in ["args_sizes_get", "environ_sizes_get"] {
        linker.func_wrap(WASI, name, |caller: Caller<'_, HostState>, to_count: u32, to_bytes: u32| {
            errno(no_strings(caller, to_count, to_bytes))
        })?;
    }
    for name in ["args_get", "environ_get"] {
        linker.func_wrap(WASI, name, |_: Caller<'_, HostState>, _: u32, _: u32| SUCCESS)?;
    }
    linker.func_wrap(WASI, "clock_time_get", |caller: Caller<'_, HostState>, clock: u32, _: u64, to: u32| {
        errno(clock_time(caller, clock, to))
    })?;
    linker.func_wrap(WASI, "clock_res_get", |caller: Caller<'_, HostState>, _: u32, to: u32| {
        errno(put(caller, to, &1_u64.to_le_bytes()))
    })?;
    linker.func_wrap(WASI, "random_get", |caller: Caller<'_, HostState>, at: u32, len: u32| {
        errno(random(caller, at, len))
    })?;
    linker.func_wrap(WASI, "fd_fdstat_get", |caller: Caller<'_, HostState>, fd: u32, to: u32| {
        errno(fdstat(caller, fd, to))
    })?;
    linker.func_wrap(
        WASI,
        "fd_fdstat_set_flags",
        |_: Caller<'_, HostState>, fd: u32, _: u32| {
            if fd <= 2 { SUCCESS } else { BADF }
        },
    )?;
    linker.func_wrap(WASI, "fd_close", |_: Caller<'_, HostState>, _: u32| BADF)?;
    // "No such directory" ends the search for preopened ones.
    linker.func_wrap(WASI, "fd_prestat_get", |_: Caller<'_, HostState>, _: u32, _: u32| BADF)?;
    linker.func_wrap(WASI, "fd_prestat_dir_name", |_: Caller<'_, HostState>, _: u32, _: u32, _: u32| BADF)?;
    linker.func_wrap(WASI, "sched_yield", |_: Caller<'_, HostState>| SUCCESS)?;
    // As Envoy: nothing is waited for and nothing has happened. Go's runtime throws at any error.
    linker.func_wrap(WASI, "poll_oneoff", |caller: Caller<'_, HostState>, _: u32, _: u32, _: u32, to: u32| {
        errno(put(caller, to, &0_u32.to_le_bytes()))
    })?;
    linker.func_wrap(
        WASI,
        "path_open",
        |_: Caller<'_, HostState>, _: u32, _: u32, _: u32, _: u32, _: u32, _: u64, _: u64, _: u32, _: u32| NOENT,
    )?;
    linker.func_wrap(WASI, "proc_exit", |_: Caller<'_, HostState>, code: u32| -> wasmtime::Result<()> {
        Err(wasmtime::Error::new(Exit(code)))
    })?;
    refuse_the_rest(linker, module)?;
    linker.alias_module(WASI, UNSTABLE)
}

/// Runtimes import far more than they call; what is not here answers "not supported".
fn refuse_the_rest(linker: &mut Linker<HostState>, module: &Module) -> wasmtime::Result<()> {
    let of_wasi = |import: &ImportType<'_>| [WASI, UNSTABLE].contains(&import.module());
    let unsupported = |import: &ImportType<'_>| of_wasi(import) && UNSUPPORTED.contains(&import.name());
    for import in module.imports().filter(unsupported) {
        let ExternType::Func(ty) = import.ty() else { continue };
        let returns_errno = ty.results().len() == 1 && ty.results().all(|result| matches!(result, ValType::I32));
        if returns_errno {
            // A module that imports it twice, or by both names, means the same.
            let _ = linker.func_new(WASI, import.name(), ty, |_, _, results| {
                results.fill(Val::I32(NOSYS));
                Ok(())
            });
        }
    }
    Ok(())
}

fn errno(result: Result<(), u32>) -> u32 {
    result.err().unwrap_or(SUCCESS)
}

fn put(mut caller: Caller<'_, HostState>, to: u32, bytes: &[u8]) -> Result<(), u32> {
    let (memory, _) = split(&mut caller).map_err(|_| FAULT)?;
    write(memory, to, bytes).map_err(|_| FAULT)
}

fn fd_write(mut caller: Caller<'_, HostState>, fd: u32, iov: u32, count: u32, to: u32) -> Result<(), u32> {
    let (lines, level) = match fd {
        1 => (0, LogLevel::Info),
        2 => (1, LogLevel::Error),
        _ => return Err(BADF),
    };
    let (memory, state) = split(&mut caller).map_err(|_| FAULT)?;
    let table = read(memory, iov, count.checked_mul(8).ok_or(INVAL)?).map_err(|_| FAULT)?;
    let mut written = 0_u32;
    for &[a, b, c, d, e, f, g, h] in table.as_chunks::<8>().0 {
        let (at, len) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let bytes = read(memory, at, len).map_err(|_| FAULT)?;
        written = written.checked_add(len).ok_or(INVAL)?;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            let Some(line) = state.output.get_mut(lines) else { return Err(BADF) };
            line.extend_from_slice(text);
            if ended || line.len() >= MAX_LINE {
                state.env.log(level, line);
                line.clear();
            }
        }
    }
    write_u32(memory, to, written).map_err(|_| FAULT)
}

fn no_strings(mut caller: Caller<'_, HostState>, to_count: u32, to_bytes: u32) -> Result<(), u32> {
    let (memory, _) = split(&mut caller).map_err(|_| FAULT)?;
    write_u32(memory, to_count, 0).map_err(|_| FAULT)?;
    write_u32(memory, to_bytes, 0).map_err(|_| FAULT)
}

fn clock_time(caller: Caller<'_, HostState>, clock: u32, to: u32) -> Result<(), u32> {
    let env = &caller.data().env;
    let now = match clock {
        0 => env.now(),
        1 => env.monotonic(),
        _ => return Err(INVAL),
    };
    put(caller, to, &now.to_le_bytes())
}

fn random(mut caller: Caller<'_, HostState>, at: u32, len: u32) -> Result<(), u32> {
    let (memory, state) = split(&mut caller).map_err(|_| FAULT)?;
    let end = at.checked_add(len).ok_or(FAULT)?;
    let out = memory.get_mut(at as usize..end as usize).ok_or(FAULT)?;
    state.env.random(out).map_err(|_| IO)
}

/// The three standard streams are character devices.
fn fdstat(caller: Caller<'_, HostState>, fd: u32, to: u32) -> Result<(), u32> {
    if fd > 2 {
        return Err(BADF);
    }
    let mut stat = [0_u8; 24];
    stat[0] = 2;
    // The right to write.
    stat[8] = 64;
    put(caller, to, &stat)
}
