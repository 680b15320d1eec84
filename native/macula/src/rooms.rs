//! Which file knows which: arrows between rooms point down, and no files stand in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each room and the rooms its files may use.
const ROOMS: [(&str, &[&str]); 7] = [
    ("vm", &[]),
    ("udp", &["vm"]),
    ("tls", &["vm"]),
    ("engine", &["vm", "udp", "tls"]),
    ("quic", &["vm", "udp", "tls", "engine"]),
    ("distribution", &["vm", "udp", "tls", "engine"]),
    ("peering", &["vm"]),
];

/// A module by the names that lead to it.
type Module = Vec<String>;

/// The modules each module uses.
fn uses() -> BTreeMap<Module, BTreeSet<Module>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    find(&root, &mut files);
    let modules: BTreeMap<Module, PathBuf> = files
        .into_iter()
        .filter_map(|file| Some((module(file.strip_prefix(&root).ok()?), file)))
        .collect();
    modules
        .iter()
        .map(|(name, file)| {
            let text = fs::read_to_string(file).unwrap_or_default();
            // What a test uses is no part of the design.
            let code = text.split("\nmod tests").next().unwrap_or("");
            let used = paths(code, name)
                .into_iter()
                .filter_map(|path| longest(&path, &modules))
                .filter(|used| used != name)
                .collect();
            (name.clone(), used)
        })
        .collect()
}

fn find(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

fn module(file: &Path) -> Module {
    let mut names: Module = file
        .with_extension("")
        .iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    if names
        .last()
        .is_some_and(|name| name == "mod" || name == "lib")
    {
        names.pop();
    }
    names
}

/// Every path in the code that begins with `crate::` or `super::`, with the names in its braces.
fn paths(code: &str, of: &Module) -> Vec<Module> {
    let mut paths = Vec::new();
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    for (start, base) in [("crate::", Vec::new()), ("super::", parent(of))] {
        for (at, _) in code.match_indices(start) {
            let rest = &code[at + start.len()..];
            let mut names = base.clone();
            let mut rest = rest;
            loop {
                let end = rest
                    .find(|c: char| !c.is_alphanumeric() && c != '_')
                    .unwrap_or(rest.len());
                if end == 0 {
                    break;
                }
                names.push(rest[..end].to_owned());
                rest = &rest[end..];
                match rest.strip_prefix("::") {
                    Some(after) => rest = after,
                    None => break,
                }
            }
            match rest.strip_prefix('{').and_then(|r| r.split('}').next()) {
                Some(list) => paths.extend(list.split(',').map(|name| {
                    let name = name.split("::").next().unwrap_or("").trim().to_owned();
                    names.iter().cloned().chain([name]).collect()
                })),
                None => paths.push(names),
            }
        }
    }
    paths
}

fn parent(of: &Module) -> Module {
    of[..of.len().saturating_sub(1)].to_vec()
}

/// The module a path leads into: the rest names what is in it.
fn longest(path: &Module, modules: &BTreeMap<Module, PathBuf>) -> Option<Module> {
    (1..=path.len())
        .rev()
        .map(|n| path[..n].to_vec())
        .find(|name| modules.contains_key(name))
}

#[test]
fn arrows_between_rooms_point_down() {
    let mut wrong = Vec::new();
    for (name, used) in uses() {
        let Some(room) = name.first() else { continue };
        let allowed = ROOMS.iter().find(|(r, _)| r == room);
        for other in used {
            let into = &other[0];
            if into != room && !allowed.is_some_and(|(_, down)| down.contains(&into.as_str())) {
                wrong.push(format!("{} uses {}", name.join("::"), other.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_files_stand_in_a_circle() {
    let uses = uses();
    assert!(uses.len() > 30, "the files are found: {}", uses.len());
    let circles: Vec<String> = uses
        .keys()
        .filter(|name| reaches(&uses, name))
        .map(|name| {
            let used: Vec<String> = uses[name].iter().map(|m| m.join("::")).collect();
            format!("{} uses {}", name.join("::"), used.join(" "))
        })
        .collect();
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

/// Whether a way leads from the module back to it.
fn reaches(uses: &BTreeMap<Module, BTreeSet<Module>>, start: &Module) -> bool {
    let mut seen = BTreeSet::new();
    let mut next: Vec<&Module> = uses[start].iter().collect();
    while let Some(name) = next.pop() {
        if name == start {
            return true;
        }
        if seen.insert(name) {
            next.extend(uses.get(name).into_iter().flatten());
        }
    }
    false
}
