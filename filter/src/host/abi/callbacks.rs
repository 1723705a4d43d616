//! Callbacks into the VM. Those that are not here the host need not call, and a call that is not made costs nothing.

use std::cell::RefCell;
use std::ptr::null_mut;

use super::Abi;
use crate::host::{Action, Host, Level};
use crate::vm::Vm;

thread_local! {
    static VM: RefCell<Vm<Abi>> = RefCell::new(Vm::new(Abi));
}

/// Runs a callback. One that comes while another is running is a fault of the host, and gets the answer `otherwise`.
fn enter<T>(callback: impl FnOnce(&mut Vm<Abi>) -> T, otherwise: impl FnOnce() -> T) -> T {
    VM.with(|vm| match vm.try_borrow_mut() {
        Ok(mut vm) => callback(&mut vm),
        Err(_) => {
            Abi.log(Level::Error, "portolan: the host calls back while a callback is running");
            otherwise()
        }
    })
}

unsafe extern "C" {
    safe fn __wasm_call_ctors();
}

#[unsafe(no_mangle)]
extern "C" fn _initialize() {
    __wasm_call_ctors();
    std::panic::set_hook(Box::new(|info| Abi.log(Level::Critical, &format!("portolan: {info}"))));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

/// Memory for what a host call gives back; null where there is none left.
#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    let mut memory: Vec<u8> = Vec::new();
    if memory.try_reserve_exact(size).is_err() {
        return null_mut();
    }
    memory.resize(size, 0);
    Box::into_raw(memory.into_boxed_slice()).cast()
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(_context: u32, _configuration_size: usize) -> u32 {
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(context: u32, _configuration_size: usize) -> u32 {
    enter(|vm| u32::from(vm.on_configure(context)), || 0)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(context: u32) {
    enter(|vm| vm.on_tick(context), || ());
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_receive(_context: u32, token: u32, _size: usize) {
    enter(|vm| vm.on_stream_message(token), || ());
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_close(_context: u32, token: u32, status: u32) {
    enter(|vm| vm.on_stream_close(token, status), || ());
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, _headers: u32, _end: u32) -> u32 {
    let refuse = || {
        let _ = Abi.local_response(503, "portolan_host_failure", "portolan: the host calls back out of turn\n");
        Action::Pause
    };
    enter(|vm| vm.on_request_headers(context), refuse) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(context: u32, _headers: u32, _end: u32) -> u32 {
    enter(|vm| vm.on_response_headers(context), || Action::Continue) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_new_connection(_context: u32) -> u32 {
    let refuse = || {
        let _ = Abi.close_downstream();
        Action::Pause
    };
    enter(Vm::on_new_connection, refuse) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_delete(context: u32) {
    enter(|vm| vm.on_delete(context), || ());
}
