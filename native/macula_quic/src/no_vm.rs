//! The functions of the VM, for unit tests, which run without one: a test executable must find them
//! to start, and a test that calls one has lost its way.

macro_rules! absent {
    ($($name:ident,)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() {
                eprintln!(concat!(stringify!($name), " called without a VM"));
                std::process::abort();
            }
        )*
    };
}

absent! {
    enif_alloc_binary,
    enif_alloc_env,
    enif_alloc_resource,
    enif_clear_env,
    enif_compare,
    enif_compare_monitors,
    enif_convert_time_unit,
    enif_demonitor_process,
    enif_free_env,
    enif_get_list_cell,
    enif_get_local_pid,
    enif_get_map_value,
    enif_get_resource,
    enif_get_tuple,
    enif_get_uint,
    enif_get_ulong,
    enif_inspect_binary,
    enif_inspect_iolist_as_binary,
    enif_is_atom,
    enif_is_empty_list,
    enif_is_exception,
    enif_is_list,
    enif_is_ref,
    enif_keep_resource,
    enif_make_atom_len,
    enif_make_badarg,
    enif_make_binary,
    enif_make_copy,
    enif_make_list_from_array,
    enif_make_map_from_arrays,
    enif_make_new_binary,
    enif_make_resource,
    enif_make_sub_binary,
    enif_make_tuple_from_array,
    enif_make_uint,
    enif_make_ulong,
    enif_monitor_process,
    enif_monotonic_time,
    enif_open_resource_type_x,
    enif_raise_exception,
    enif_release_binary,
    enif_release_resource,
    enif_schedule_nif,
    enif_self,
    enif_send,
    enif_snprintf,
    enif_thread_type,
    enif_time_offset,
}
