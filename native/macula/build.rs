//! Link arguments the library cannot do without.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    match os.as_str() {
        // The VM unmaps a purged library; our native threads would then run in unmapped memory.
        "linux" | "freebsd" => println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete"),
        // The NIF functions are resolved by the VM when it loads the library.
        "macos" => {
            println!("cargo::rustc-cdylib-link-arg=-undefined");
            println!("cargo::rustc-cdylib-link-arg=dynamic_lookup");
        }
        _ => {}
    }
}
