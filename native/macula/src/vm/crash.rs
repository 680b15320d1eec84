//! A linked-in driver that the VM calls before it writes a crash dump. It tells no NIF, but every port
//! whose driver has an `emergency_close` callback. The library is that driver too; a port of it is kept
//! open by whoever wants its peers to be told.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use crate::vm::halt;

/// `ErlDrvEntry` of erl_driver.h, extended version 3.
#[repr(C)]
struct Entry {
    init: *const c_void,
    start: Option<extern "C" fn(port: *mut c_void, command: *mut c_char) -> *mut c_void>,
    stop: *const c_void,
    output: *const c_void,
    ready_input: *const c_void,
    ready_output: *const c_void,
    driver_name: *const c_char,
    finish: *const c_void,
    handle: *mut c_void,
    control: *const c_void,
    timeout: *const c_void,
    outputv: *const c_void,
    ready_async: *const c_void,
    flush: *const c_void,
    call: *const c_void,
    unused_event: *const c_void,
    extended_marker: c_int,
    major_version: c_int,
    minor_version: c_int,
    driver_flags: c_int,
    handle2: *mut c_void,
    process_exit: *const c_void,
    stop_select: *const c_void,
    emergency_close: Option<extern "C" fn(data: *mut c_void)>,
}

const EXTENDED_MARKER: u32 = 0xfeee_eeed;

/// What the VM asks a driver for. It writes to what it gets, so each load gets its own.
#[unsafe(no_mangle)]
extern "C" fn driver_init() -> *const c_void {
    let entry = Box::new(Entry {
        init: ptr::null(),
        start: Some(start),
        stop: ptr::null(),
        output: ptr::null(),
        ready_input: ptr::null(),
        ready_output: ptr::null(),
        driver_name: c"macula_nif".as_ptr(),
        finish: ptr::null(),
        handle: ptr::null_mut(),
        control: ptr::null(),
        timeout: ptr::null(),
        outputv: ptr::null(),
        ready_async: ptr::null(),
        flush: ptr::null(),
        call: ptr::null(),
        unused_event: ptr::null(),
        extended_marker: EXTENDED_MARKER.cast_signed(),
        major_version: 3,
        minor_version: 3,
        driver_flags: 1, // Each port has a lock of its own.
        handle2: ptr::null_mut(),
        process_exit: ptr::null(),
        stop_select: ptr::null(),
        emergency_close: Some(emergency_close),
    });
    Box::into_raw(entry).cast()
}

extern "C" fn start(_port: *mut c_void, _command: *mut c_char) -> *mut c_void {
    // Any value but those that mean an error.
    ptr::null_mut()
}

extern "C" fn emergency_close(_data: *mut c_void) {
    halt::crash();
}
